"""Attention between the tokens of a batch of sequences, with biases from a table, and a backward pass of its own.

Of each head, for the rows i and columns j that i may read::

    U, V, Q, K = split(SiLU(P))                         P: one projection of the tokens
    S_ij = scale · q_i · k_j + table[entry_ij]          entry: which bias stands for the pair, the same in every layer
    A_ij = SiLU(S_ij) / N    or    softmax_j(S_ij)
    O_i  = Σ_j A_ij v_j

`plain_attention` is these lines, for torch to differentiate, compile or vectorise; `attention` gives the same numbers
in less time on a CPU (``pytest -m benchmark -s tests/benchmarks/test_hstu_speed.py``):

- what a token may not read is an entry of the table too, at `CLOSED`, where SiLU and softmax and their derivatives are
  exactly 0: no mask is multiplied in, forward or backward;
- entries are looked up by one index_select, and their gradient gathered by one scatter_add over all heads;
- all heads are one batch of products, on Q, K and V that were laid out for them once;
- long causal sequences are worked in blocks of rows, each with the columns that its last row may read;
- elementwise derivatives are written over their arguments: fresh memory costs a CPU more than a SiLU does.

In bfloat16 (what autocast hands over) products are of bfloat16 and add up in float32; what follows them, the table's
gradient too, is float32 again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsim_gr.devices import in_a_transform, wide

NORMALISERS = ("length", "softmax")
"""What makes weights of scores: SiLU over the configured length (HSTU), or softmax over what may be read."""

CLOSED = -1e9
"""The bias of a pair that is not to be read: SiLU of it and its derivative are 0 in every precision, and exp is."""

silu_backward = torch.ops.aten.silu_backward.grad_input


class Block(NamedTuple):
    """Some rows of all pairs of tokens, and the columns that they read.

    Attributes:
        start, stop: the rows; columns are 0 to the width of ``entries``.
        entries: (B, stop - start, columns) or (1, stop - start, columns) int64: which entry of a table of biases.
    """

    start: int
    stop: int
    entries: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def columns(self) -> slice:
        return slice(0, self.entries.shape[-1])


class AttentionKind(NamedTuple):
    """What attention does with its scores.

    Attributes:
        heads: H.
        activated: whether SiLU is applied to U, V, Q and K.
        normaliser: one of `NORMALISERS`.
        length: N.
        scale: of the products.
    """

    heads: int
    activated: bool = True
    normaliser: str = "length"
    length: int = 1
    scale: float = 1.0

    @property
    def share(self) -> float:
        """What a weight is multiplied with after its SiLU."""
        return 1.0 / self.length if self.normaliser == "length" else 1.0


def attention(projected: Tensor, table: Tensor, blocks: Sequence[Block], kind: AttentionKind) -> tuple[Tensor, Tensor]:
    """The attended values of all heads, and the gate.

    Args:
        projected: P (B, T, 4d): U, V, Q, K, before their SiLU.
        table: (n,) biases that the blocks' entries name, `CLOSED` among them.
        blocks: all rows, in order; the last one has all T columns.
        kind: which attention.

    Returns:
        O (B, T, d), and U (B, T, d) after its SiLU, both float32 at least.
    """
    if in_a_transform():
        return plain_attention(projected, table, blocks, kind)
    trains = torch.is_grad_enabled() and (projected.requires_grad or table.requires_grad)
    values, gate = _Attention.apply(projected, table, tuple(blocks), kind, trains)
    return values, gate


def plain_attention(
    projected: Tensor, table: Tensor, blocks: Sequence[Block], kind: AttentionKind
) -> tuple[Tensor, Tensor]:
    """`attention` as its equations, differentiated by torch."""
    u, v, q, k = (F.silu(projected) if kind.activated else projected).chunk(4, dim=-1)
    q, k, v = (part.unflatten(-1, (kind.heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, T, d/H)
    rows = []
    for block in blocks:
        bias = table[block.entries].unsqueeze(1)  # the same in every head
        scores = kind.scale * (q[:, :, block.rows] @ k[:, :, block.columns].mT) + bias
        weights = F.silu(scores) / kind.length if kind.normaliser == "length" else torch.softmax(scores, dim=-1)
        rows.append(weights.to(v.dtype) @ v[:, :, block.columns])
    values = torch.cat(rows, dim=2).transpose(1, 2).flatten(2)
    return values.to(wide(values.dtype)), u.to(wide(u.dtype))


def attention_of_one(
    asking: Tensor, asked: Tensor, table: Tensor, entries: Tensor, kind: AttentionKind
) -> tuple[Tensor, Tensor]:
    """`attention` of one row a sequence.

    Args:
        asking: (B, 1, 2d): U and Q of that row, before their SiLU.
        asked: (B, T, 2d): V and K of all tokens, before their SiLU.
        table: (n,) biases that ``entries`` name, `CLOSED` among them.
        entries: (B, T) or (1, T) int64.
        kind: which attention.

    Returns:
        O (B, 1, d), and U (B, 1, d) after its SiLU, both float32 at least.
    """
    u, q = (F.silu(asking) if kind.activated else asking).chunk(2, dim=-1)
    v, k = (F.silu(asked) if kind.activated else asked).unflatten(-1, (2, kind.heads, -1)).permute(2, 0, 3, 1, 4)
    bias = table.index_select(0, entries.flatten()).view(-1, 1, 1, asked.shape[1])
    scores = kind.scale * (q.unflatten(-1, (kind.heads, -1)).transpose(1, 2) @ k.mT) + bias
    weights = F.silu(scores) / kind.length if kind.normaliser == "length" else torch.softmax(scores, dim=-1)
    values = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return values.to(wide(values.dtype)), u.to(wide(u.dtype))


class _Attention(torch.autograd.Function):
    """`plain_attention` with its gradients by hand. Heads stand before users: (H, B, T, d/H), as one batch of H·B."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, table: Tensor, blocks: tuple[Block, ...], kind: AttentionKind, trains: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(projected.device.type, enabled=False):
            u, *sources = projected.chunk(4, dim=-1)
            b, t, d = u.shape
            v, q, k = mixed = projected.new_empty(3, kind.heads * b, t, d // kind.heads)
            for part, source in zip(mixed, sources, strict=True):
                _split(part, kind).copy_(_by_head(source, kind))
            if kind.activated:
                F.silu(mixed, inplace=True)
            if kind.scale != 1.0:
                q *= kind.scale
            biases, kept, attended = table.to(projected.dtype), [], torch.empty_like(v)
            for block in blocks:
                scores = torch.bmm(q[:, block.rows], k[:, block.columns].mT)
                _split(scores, kind).add_(biases.index_select(0, block.entries.flatten()).view(block.entries.shape))
                by_length = kind.normaliser == "length"
                weights = F.silu(scores, inplace=not trains) if by_length else torch.softmax(scores, dim=-1)
                if trains:
                    kept += [weights, scores] if by_length else [weights]
                _product(weights, v[:, block.columns], attended[:, block.rows])
            values = projected.new_empty(b, t, d, dtype=wide(projected.dtype))
            torch.mul(_split(attended, kind), kind.share, out=_by_head(values, kind))
            ctx.save_for_backward(projected, mixed, *kept)
            ctx.blocks, ctx.kind, ctx.table = blocks, kind, (len(table), table.dtype)
            return values, (F.silu(u) if kind.activated else u.clone()).to(values.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_values: Tensor, d_gate: Tensor) -> tuple[Tensor | None, ...]:
        blocks, kind = ctx.blocks, ctx.kind
        projected, mixed, *kept = ctx.saved_tensors
        with torch.autocast(projected.device.type, enabled=False):
            v, q, k = mixed
            d_v, d_q, d_k = d_mixed = torch.empty_like(mixed)
            above = torch.empty_like(v)
            torch.mul(_by_head(d_values, kind), kind.share, out=_split(above, kind))
            d_table = None
            if ctx.needs_input_grad[1]:
                d_table = projected.new_zeros(ctx.table[0], dtype=wide(projected.dtype))
            # the last block reads all columns: it lays out the gradients of keys and values, the others add to them
            for block in reversed(blocks):
                scores = kept.pop() if kind.normaliser == "length" else None
                weights, rows, columns, adds = kept.pop(), block.rows, block.columns, block is not blocks[-1]
                _product(weights.mT, above[:, rows], d_v[:, columns], adds)
                d_scores = _to_scores(torch.bmm(above[:, rows], v[:, columns].mT), weights, scores)
                _product(d_scores.mT, q[:, rows], d_k[:, columns], adds)
                _product(d_scores, k[:, columns], d_q[:, rows])
                if d_table is not None:
                    _add_to_table(d_table, _split(d_scores, kind), block.entries)
            if kind.scale != 1.0:
                d_q *= kind.scale
            d_projected = torch.empty_like(projected)
            d_u, *targets = d_projected.chunk(4, dim=-1)
            d_u.copy_(d_gate)
            for part, target in zip(d_mixed, targets, strict=True):
                _by_head(target, kind).copy_(_split(part, kind))
            if kind.activated:
                silu_backward(d_projected, projected, grad_input=d_projected)
            return d_projected, None if d_table is None else d_table.to(ctx.table[1]), None, None, None


def _by_head(x: Tensor, kind: AttentionKind) -> Tensor:
    """(B, T, d) seen as (H, B, T, d/H)."""
    b, t, d = x.shape
    return x.view(b, t, kind.heads, d // kind.heads).permute(2, 0, 1, 3)


def _split(x: Tensor, kind: AttentionKind) -> Tensor:
    """(H·B, rows, columns) seen as (H, B, rows, columns)."""
    return x.view(kind.heads, -1, *x.shape[1:])


def _product(a: Tensor, b: Tensor, out: Tensor, adds: bool = False) -> None:
    if adds:
        out += torch.bmm(a, b)
    elif out.is_contiguous():
        torch.bmm(a, b, out=out)
    else:  # bmm would work on a copy of what it is about to overwrite
        out.copy_(torch.bmm(a, b))


def _to_scores(d_weights: Tensor, weights: Tensor, scores: Tensor | None) -> Tensor:
    """The gradient of the scores, written over that of the weights; without scores, of a softmax."""
    if scores is not None:
        return silu_backward(d_weights, scores, grad_input=d_weights)
    d_weights -= (d_weights * weights).sum(dim=-1, keepdim=True)
    return d_weights.mul_(weights)


def _add_to_table(d_table: Tensor, d_scores: Tensor, entries: Tensor) -> None:
    """Adds (H, B, rows, columns) gradients of scores to the entries that stand for their pairs."""
    pairs = d_scores[0].to(d_table.dtype, copy=len(d_scores) > 1)
    for head in d_scores[1:]:
        pairs += head
    if len(entries) == 1:
        pairs = pairs.sum(dim=0)
    entries, pairs = entries.flatten(), pairs.flatten()
    if pairs.device.type == "cpu":
        d_table.scatter_add_(0, entries, pairs)
    else:  # on a GPU scatter_add_ adds in no fixed order, and this does
        d_table.index_put_((entries,), pairs, accumulate=True)
