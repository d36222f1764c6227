"""Cross-entropy over the whole catalogue, or over a sample of it, without keeping a logit of every row and title.

Of each row i, with its state s_i, the title y_i that was chosen, and the titles C_i that could have been::

    ℓ_i = log(exp(s_i·v_y) + Σ_{j ∈ C_i, j ≠ y} m_j exp(s_i·v_j)) − s_i·v_y        m_j = 1, or 1/π_j of a sampled title

Logits exist for some rows at a time, `chunk_rows` of them. What is done to them is done in place while they lie in the
cache: one product, closed titles, exponentials, and, where the weight of each row's loss is known beforehand, the
gradient at once, so that only the gradients of the states and of the titles' directions are kept. That is cut
cross-entropy (Wijmans et al., arXiv:2411.09009) and Liger's fused linear cross-entropy (Hsu et al., arXiv:2410.10989)
in plain tensor operations; those write kernels for a GPU, where logits never leave its registers.

Measured on one core (6,400 rows, 1,000 titles, d = 64, float32): powers of two instead of e take a third of the time
(directions are scaled by log₂ e before the product), and a row's largest logit need not be subtracted where no logit
can overflow (Cauchy–Schwarz), as under the cosine. Three products are five sixths of what is left.

In bfloat16 (autocast) operands of the products are bfloat16 and add up in float32, and so are their results, as PyTorch
rounds them; exponentials, sums and losses are float32.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsim_gr.devices import in_a_transform, wide

LOG2_E, LN_2 = 1.0 / math.log(2.0), math.log(2.0)

SAFE_EXPONENT = 60.0
"""Of 2, within which logits need no shift: 2^±60 times millions of titles are plain float32, and bfloat16 too."""

CHUNK_BYTES = 2**22
"""Of a chunk's logits: what a core's share of the cache holds, with room for the rest. With 1,000 titles, chunks of 1.5
to 5 MB take the same time within 4 %; of .25 MB a third more, and the whole at once, 26 MB, a sixth more."""

LEAST_ROWS = 256
"""Of a chunk where the catalogue is large: each chunk adds to the gradients of all titles, and fewer rows would not be
worth that. With 20,000 titles 128 to 512 rows take the same time within 5 %; 32 rows a twelfth more."""


class Closed(NamedTuple):
    """Titles that are no choice for a row. The chosen title of a row always is one, whatever stands here.

    Attributes:
        rows, titles: (K,) int64 each, pairs, rows ascending: what the row's user has seen.
        users: (N,) int64, the row of ``unreleased`` that holds for each row; None where ``unreleased`` is.
        unreleased: (B, I) bool, titles that are not out yet, or None.
    """

    rows: Tensor
    titles: Tensor
    users: Tensor | None = None
    unreleased: Tensor | None = None


class Sample(NamedTuple):
    """Titles that stand for the catalogue.

    Attributes:
        titles: (S,) int64, all different.
        factors: (S,) float32, m = 1/π, π the probability with which each title gets into a sample.
    """

    titles: Tensor
    factors: Tensor


# -- losses ------------------------------------------------------------------------------------------------------


def cross_entropies(
    states: Tensor,
    directions: Tensor,
    chosen: Tensor,
    closed: Closed | None = None,
    sample: Sample | None = None,
    chunk_rows: int = 0,
) -> Tensor:
    """−log π of the chosen title of every row, differentiable row by row.

    The backward pass does not know the rows' weights before it is called, and works the logits out again: four products
    where `weighted_cross_entropy` needs three.

    Args:
        states: (N, d).
        directions: (I, d), what states are multiplied with.
        chosen: (N,) int64.
        closed: titles that are no choice.
        sample: titles that stand for all; without it, all do.
        chunk_rows: rows whose logits exist at a time; 0 for the default.

    Returns:
        (N,), float32 at least.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(states, directions, chosen)
    columns = _columns(directions, chosen, closed, sample)
    if in_a_transform():
        return plain_losses(states, columns)
    losses: Tensor = _RowLosses.apply(states, columns.own, columns.titles, columns.without_graph(), chunk_rows)
    return losses


def weighted_cross_entropy(
    states: Tensor,
    directions: Tensor,
    chosen: Tensor,
    weights: Tensor,
    closed: Closed | None = None,
    sample: Sample | None = None,
    chunk_rows: int = 0,
) -> Tensor:
    """Σ_i w_i ℓ_i, a scalar; the gradient is worked out together with it, in one pass over the logits.

    Args:
        weights: (N,), the weight of each row's loss: 1/N for their mean; no gradient flows through it.
        states, directions, chosen, closed, sample, chunk_rows: see `cross_entropies`.

    Raises:
        ValueError: shapes that do not fit each other, or weights that want a gradient.
    """
    _check(states, directions, chosen)
    if weights.shape != chosen.shape or weights.requires_grad:
        raise ValueError(
            f"weights must be {tuple(chosen.shape)} numbers without a gradient, got {tuple(weights.shape)}"
            f"{' with one; use cross_entropies' if weights.requires_grad else ''}"
        )
    columns = _columns(directions, chosen, closed, sample)
    if in_a_transform():
        return plain_losses(states, columns) @ weights
    kept = columns.without_graph()
    loss: Tensor = _WeightedLoss.apply(states, columns.own, columns.titles, weights, kept, chunk_rows)
    return loss


def rows_of_a_chunk(n_rows: int, n_titles: int, chunk_rows: int = 0) -> int:
    """Rows whose logits exist at a time: ``chunk_rows``, or as many as `CHUNK_BYTES` hold, `LEAST_ROWS` at least."""
    rows = chunk_rows or max(LEAST_ROWS, CHUNK_BYTES // (4 * n_titles))
    chunks = max(1, -(-n_rows // rows))
    return max(1, -(-n_rows // chunks))  # all of them as equal as can be


def _check(states: Tensor, directions: Tensor, chosen: Tensor) -> None:
    fits = states.ndim == directions.ndim == 2 and states.shape[1] == directions.shape[1]
    if not fits or chosen.shape != states.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (states, directions, chosen))
        raise ValueError(f"a softmax takes (N, d) states, (I, d) directions and (N,) titles, got {shapes}")


class Columns(NamedTuple):
    """The titles that logits are worked out for, and what is closed among them.

    Attributes:
        chosen: (N,) the column of each row's own title; where titles are sampled, None.
        own: (N, d) the directions of the rows' own titles where those may have no column; else None.
        titles: (C, d) directions.
        factors: (C,), or None for ones.
        shut: closed places in the (N, C) logits as row·C + column, each list ascending by row.
        users, unreleased: of `Closed`; ``unreleased`` (B, C).
    """

    chosen: Tensor | None
    own: Tensor | None
    titles: Tensor
    factors: Tensor | None
    shut: tuple[Tensor, ...]
    users: Tensor | None
    unreleased: Tensor | None

    def without_graph(self) -> "Columns":
        """What a backward pass may keep beside the tensors that autograd keeps."""
        return self._replace(own=None, titles=self.titles.detach())


def _columns(directions: Tensor, chosen: Tensor, closed: Closed | None, sample: Sample | None) -> Columns:
    none = chosen.new_empty(0)
    closed = closed or Closed(none, none)
    users, unreleased = closed.users, closed.unreleased
    if sample is None:
        seen = _places(closed.rows, closed.titles, len(directions))
        return Columns(chosen, None, directions, None, (seen,), users, unreleased)
    c = len(sample.titles)
    column = chosen.new_full((len(directions),), -1)
    column[sample.titles] = torch.arange(c, device=chosen.device)
    rows = torch.arange(len(chosen), device=chosen.device)
    shut = (_places(closed.rows, column[closed.titles], c), _places(rows, column[chosen], c))
    unreleased = None if unreleased is None else unreleased[:, sample.titles]
    # embedding's backward pass adds in a fixed order, on a GPU too
    own, titles = (F.embedding(which, directions) for which in (chosen, sample.titles))
    return Columns(None, own, titles, sample.factors, shut, users, unreleased)


def _places(rows: Tensor, columns: Tensor, c: int) -> Tensor:
    places = rows * c + columns
    return places[columns >= 0] if bool((columns < 0).any()) else places


def plain_losses(states: Tensor, columns: Columns) -> Tensor:
    """(N,): ℓ_i by its equation, all logits at once, for torch to differentiate, compile or vectorise."""
    logits = states @ columns.titles.T
    shut = torch.zeros(logits.shape, dtype=torch.bool, device=states.device)
    for places in columns.shut:
        shut.view(-1).index_fill_(0, places, True)
    if columns.unreleased is not None and columns.users is not None:
        shut |= columns.unreleased[columns.users]
    if columns.chosen is not None:
        shut.scatter_(1, columns.chosen[:, None], True)
        own = logits.gather(1, columns.chosen[:, None])
    else:
        assert columns.own is not None
        own = (states * columns.own).sum(dim=1, keepdim=True)
    if columns.factors is not None:
        logits = logits + columns.factors.log()
    logits = torch.cat([logits.masked_fill(shut, -math.inf), own], dim=1)
    return torch.logsumexp(logits, dim=1) - own.squeeze(1)


# -- the pass over the logits ------------------------------------------------------------------------------------


class _Pass:
    """One pass over the logits, some rows at a time, in powers of two.

    Args:
        states: (N, d).
        columns: what they are compared with.
        chunk_rows: rows at a time; 0 for the default.
    """

    def __init__(self, states: Tensor, columns: Columns, chunk_rows: int) -> None:
        narrow = _product_dtype(states)
        self.columns = columns
        self.wide = wide(states.dtype)
        self.n, self.c = len(states), len(columns.titles)
        self.rows = rows_of_a_chunk(self.n, self.c, chunk_rows)
        self.states = states.to(self.wide)
        self.own = None if columns.own is None else columns.own.to(self.wide)
        self.own_exponents = None if self.own is None else (self.states * self.own).sum(dim=1) * LOG2_E
        titles = columns.titles.to(self.wide) * LOG2_E
        self.shifted = not _bounded(self.states, titles, self.own)
        self.state_operand, self.title_operand = self.states.to(narrow), titles.to(narrow)
        self._logits = states.new_empty(self.rows, self.c, dtype=self.wide)
        self._narrow = None if narrow == self.wide else states.new_empty(self.rows, self.c, dtype=narrow)
        self._ends = [self._split(places) for places in columns.shut]

    def _split(self, places: Tensor) -> list[int]:
        """Where the places of each chunk begin in a list of them."""
        if self.rows >= self.n:
            return [0, len(places)]
        starts = torch.arange(0, self.n + self.rows, self.rows, device=places.device) * self.c
        return torch.searchsorted(places, starts).tolist()

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows, their (n, C) exponentials (in memory that the next chunk writes over) with 0 for closed and chosen
        titles, the (n,) sums of those, and the (n,) exponents of 2 of the chosen titles; all less the same shift."""
        for k, start in enumerate(range(0, self.n, self.rows)):
            rows = slice(start, min(start + self.rows, self.n))
            terms, exponents = self._scores(rows, k)
            if self.shifted:
                shift = torch.maximum(terms.amax(dim=1), exponents)
                terms.sub_(shift[:, None])
                exponents = exponents - shift
            terms.exp2_()
            if self.columns.factors is not None:
                terms.mul_(self.columns.factors)
            yield rows, terms, terms.sum(dim=1), exponents

    def _scores(self, rows: slice, k: int) -> tuple[Tensor, Tensor]:
        """(n, C) logits over ln 2, −∞ where closed or chosen, and (n,) of the chosen titles."""
        n, columns = rows.stop - rows.start, self.columns
        logits = self._logits[:n]
        if self._narrow is None:
            torch.mm(self.state_operand[rows], self.title_operand.T, out=logits)
        else:
            logits.copy_(torch.mm(self.state_operand[rows], self.title_operand.T, out=self._narrow[:n]))
        if columns.chosen is not None:
            chosen = columns.chosen[rows, None]
            exponents = logits.gather(1, chosen).squeeze(1)
            logits.scatter_(1, chosen, -math.inf)
        else:
            assert self.own_exponents is not None
            exponents = self.own_exponents[rows]
        for places, ends in zip(columns.shut, self._ends, strict=True):
            some = places[ends[k] : ends[k + 1]]
            logits.view(-1).index_fill_(0, some - rows.start * self.c if k else some, -math.inf)
        if columns.unreleased is not None and columns.users is not None:
            logits.masked_fill_(columns.unreleased[columns.users[rows]], -math.inf)
        return logits, exponents

    def operand(self, terms: Tensor) -> Tensor:
        """The exponentials as an operand of products."""
        return terms if self._narrow is None else self._narrow[: len(terms)].copy_(terms)


def _losses(others: Tensor, exponents: Tensor) -> Tensor:
    """(n,): log(1 + others/2^exponent), which is exact where the chosen title is all but certain."""
    own = torch.exp2(exponents)
    rare = torch.log(others + own) - exponents * LN_2
    return torch.where(exponents >= -SAFE_EXPONENT, torch.log1p(others / own), rare)


class _Gradients:
    """Gradients of Σ w_i ℓ_i, filled chunk by chunk."""

    def __init__(self, over: _Pass) -> None:
        self.over = over
        self.states = torch.empty_like(over.states)
        self.own = None if over.own is None else torch.empty_like(over.own)
        self.titles = over.states.new_zeros(over.c, over.states.shape[1])

    def add(self, rows: slice, terms: Tensor, others: Tensor, exponents: Tensor, weights: Tensor) -> None:
        """Of a chunk. With p = terms/total: w·(Σ p·v − (1 − p_own)·v_own) for a state, where total·(1 − p_own) is the
        sum of the others, without a difference."""
        over = self.over
        scale = (weights / (others + torch.exp2(exponents)))[:, None]
        if over.columns.chosen is not None:
            terms.scatter_(1, over.columns.chosen[rows, None], -others[:, None])
        operand = over.operand(terms)
        by_title = torch.mm(operand, over.title_operand).to(over.wide)
        torch.mul(by_title, scale * LN_2, out=self.states[rows])
        states = over.states[rows]
        if over.own is not None and self.own is not None:
            missing = scale * others[:, None]
            self.states[rows].addcmul_(missing, over.own[rows], value=-1.0)
            torch.mul(states, -missing, out=self.own[rows])
        scaled = (states * scale).to(operand.dtype)
        if operand.dtype == over.wide:
            self.titles.addmm_(operand.T, scaled)
        else:
            self.titles.add_(torch.mm(operand.T, scaled))

    def found(self, *dtypes: torch.dtype) -> tuple[Tensor | None, ...]:
        """Of the states, of the rows' own titles, of the columns' titles."""
        each = (self.states, self.own, self.titles)
        return tuple(None if g is None else g.to(dtype) for g, dtype in zip(each, dtypes, strict=True))


def _product_dtype(states: Tensor) -> torch.dtype:
    """bfloat16 where autocast asks for it or the states are; float32 instead of float16, whose range is too small."""
    kind = states.device.type
    asked = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    if asked == torch.bfloat16 and states.dtype != torch.float64:
        return torch.bfloat16
    return torch.promote_types(torch.float32, states.dtype)


def _bounded(states: Tensor, titles: Tensor, own: Tensor | None) -> bool:
    """Whether no logit, in powers of two, can leave ±`SAFE_EXPONENT`, by Cauchy–Schwarz."""
    if states.device.type != "cpu":
        return False  # asking would wait for the device, and the shift costs it nothing
    if len(states) == 0:
        return True
    longest = [torch.linalg.vector_norm(x, dim=1).amax() for x in (states, titles)]
    bound = longest[0] * longest[1]
    if own is not None:
        bound = torch.maximum(bound, longest[0] * torch.linalg.vector_norm(own, dim=1).amax() * LOG2_E)
    return bool(bound <= SAFE_EXPONENT)


class _WeightedLoss(torch.autograd.Function):
    """Σ w_i ℓ_i, its gradient worked out in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        own: Tensor | None,
        titles: Tensor,
        weights: Tensor,
        columns: Columns,
        chunk_rows: int,
    ) -> Tensor:
        over = _Pass(states, columns._replace(own=own, titles=titles), chunk_rows)
        with torch.autocast(states.device.type, enabled=False):
            gradients = _Gradients(over) if any(ctx.needs_input_grad[:3]) else None
            weights = weights.to(over.wide)
            losses = states.new_empty(over.n, dtype=over.wide)
            for rows, terms, others, exponents in over.chunks():
                losses[rows] = _losses(others, exponents)
                if gradients is not None:
                    gradients.add(rows, terms, others, exponents, weights[rows])
            if gradients is not None:
                ctx.save_for_backward(*gradients.found(*_dtypes(states, own, titles)))
            return losses @ weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if g is None else g * above.to(g.dtype) for g in ctx.saved_tensors)
        return *found, None, None, None


class _RowLosses(torch.autograd.Function):
    """ℓ_i of every row; the backward pass goes over the logits again."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, own: Tensor | None, titles: Tensor, columns: Columns, chunk_rows: int
    ) -> Tensor:
        over = _Pass(states, columns._replace(own=own, titles=titles), chunk_rows)
        with torch.autocast(states.device.type, enabled=False):
            losses = states.new_empty(over.n, dtype=over.wide)
            for rows, _, others, exponents in over.chunks():
                losses[rows] = _losses(others, exponents)
        ctx.save_for_backward(states, own, titles)
        ctx.columns, ctx.chunk_rows = columns, chunk_rows
        ctx.narrow = over.state_operand.dtype == torch.bfloat16
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        states, own, titles = ctx.saved_tensors
        kind = states.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=ctx.narrow):
            over = _Pass(states, ctx.columns._replace(own=own, titles=titles), ctx.chunk_rows)
        with torch.autocast(kind, enabled=False):
            gradients = _Gradients(over)
            for rows, terms, others, exponents in over.chunks():
                gradients.add(rows, terms, others, exponents, above[rows].to(over.wide))
            return *gradients.found(*_dtypes(states, own, titles)), None, None


def _dtypes(states: Tensor, own: Tensor | None, titles: Tensor) -> tuple[torch.dtype, ...]:
    return states.dtype, titles.dtype if own is None else own.dtype, titles.dtype
