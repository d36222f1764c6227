"""Plackett–Luce sequences: titles drawn one after another without repetition, each by softmax over what is left.

Three samplers of one law. `gumbel` needs a uniform a title and takes one pass; `inverse_cdf` needs a few uniforms an
event, for catalogues where a uniform a title is too many; `stepwise` lets utilities change after each choice. All
are functions of utilities and uniforms alone, row by row: what a user chooses is the same, bit for bit, whatever
other rows stand beside it.

Each returns the exact log-propensity of every choice given the ones before it. What was not chosen is summed anew
and the choices are added from the last to the first, never subtracted from the whole, so that the propensities of
peaked utilities are right too: what is left may be e^-80 of the whole.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsim_gr.errors import ConfigError

FloatArray = NDArray[np.float64]
Titles = NDArray[np.int64]

BLOCK_CELLS = 2**17
"""Users × titles that are worked on at a time: a megabyte of float64 an array, which stays in a core's cache."""

LARGEST, SMALLEST = 1e290, 1e-290
"""Weights and their ratios are trusted between these: far enough from the ends of float64 that nothing in between
has lost digits to underflow."""

UNSHIFTED, UNSHIFTED_BLOCK = 300.0, 24.0
"""Utilities whose largest is within these (in float64 and in float32) are exponentiated as they are; others relative
to their largest. The second keeps the rounding of a utility to float32 below 1e-6."""

SMALLEST_BLOCK = 1e-20
"""A block of float32 weights whose sum falls below this is weighed anew: the smallest normal float32 is 1e-38, so what
counts in a sum above this line has all its digits."""

_PART = 16
"""Within a block, titles are searched by sixteens."""


class Choices(NamedTuple):
    """Drawn sequences of n users.

    Attributes:
        titles: (n, k) int64, in the order of choice, no title twice in a row.
        log_propensities: (n, k) float64, of each title given those before it; at most 0.
    """

    titles: Titles
    log_propensities: FloatArray

    @classmethod
    def joined(cls, parts: "list[Choices]") -> "Choices":
        """The rows of all parts, in order."""
        return cls(np.concatenate([p.titles for p in parts]), np.concatenate([p.log_propensities for p in parts]))


# ------------------------------------------------------------------------------------------------- a uniform a title


def gumbel(utilities: FloatArray, uniforms: FloatArray, length: int, buffers: "GumbelBuffers | None" = None) -> Choices:
    """The ``length`` largest of utility + Gumbel noise, in order, which is a Plackett–Luce sequence (Yellott 1977).

    Ordering by ``utility − ln(−ln u)`` falling is ordering by ``−ln(u)/w`` rising, with ``w = exp(utility)``. Since
    ``1 − u ≤ −ln u``, titles whose ``(1 − u)/w`` is above a bound cannot be among the first; only the few below it
    get their exact key. A row for which the bound proves too tight, or whose weights leave the range of float64, is
    sorted whole in logarithms, so the titles are always those of the definition.

    Args:
        utilities: (n, I) float64; -inf for a title that cannot be chosen.
        uniforms: (n, I) in the open interval (0, 1).
        length: k, at most as many as can be chosen.
        buffers: room to work in, for a caller who draws block after block.

    Raises:
        ConfigError: a row with fewer than ``length`` titles to choose from, or with a utility that is not a number.
    """
    n, n_titles = utilities.shape
    _refuse_length(length, n_titles)
    candidates = length + length // 4 + 4
    if candidates >= n_titles:
        return _by_sorting(utilities, uniforms, length)
    out = Choices(np.empty((n, length), dtype=np.int64), np.empty((n, length)))
    buffers = buffers or GumbelBuffers.of(min(n, max(1, BLOCK_CELLS // n_titles)), n_titles)
    rows = len(buffers.weights)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        block = np.ascontiguousarray(utilities[part]), np.ascontiguousarray(uniforms[part])
        here = Choices(out.titles[part], out.log_propensities[part])
        proven = _by_bound(*block, candidates, buffers.rows(part.stop - start), here)
        if not proven.all():
            again = np.flatnonzero(~proven)
            here.titles[again], here.log_propensities[again] = _by_sorting(block[0][again], block[1][again], length)
    return out


class GumbelBuffers(NamedTuple):
    """Room for one block of `gumbel`, used again for the next: fresh pages cost more than what is done to them.

    Attributes:
        utilities, uniforms: (rows, I), for the caller to fill.
    """

    utilities: FloatArray
    uniforms: FloatArray
    weights: FloatArray
    ratios: FloatArray
    below: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: int, n_titles: int) -> "GumbelBuffers":
        utilities, uniforms, weights, ratios = np.empty((4, rows, n_titles))
        return cls(utilities, uniforms, weights, ratios, np.empty((rows, n_titles), dtype=bool))

    def rows(self, n: int) -> "GumbelBuffers":
        utilities, uniforms, weights, ratios, below = self
        return GumbelBuffers(utilities[:n], uniforms[:n], weights[:n], ratios[:n], below[:n])


def _by_bound(
    utilities: FloatArray, uniforms: FloatArray, candidates: int, buffers: GumbelBuffers, out: Choices
) -> NDArray[np.bool_]:
    """Fills ``out`` from about ``candidates`` titles a row; says which rows are proven right."""
    _, _, weights, ratios, below = buffers
    n, n_titles = utilities.shape
    length = out.titles.shape[1]
    shift = _shift(utilities.max(axis=1), UNSHIFTED)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        np.exp(_shifted(utilities, shift, ratios), out=weights)
        np.subtract(1.0, uniforms, out=ratios)
        np.divide(ratios, weights, out=ratios)
        bound = _bound(ratios, candidates)
    usable = bound < LARGEST  # false for NaN too
    np.less_equal(ratios, np.where(usable, bound, -1.0)[:, None], out=below)
    keys, places = _keys_of_candidates(utilities, uniforms, np.flatnonzero(below), candidates)
    order = np.argsort(keys, axis=1)[:, :length]
    last = np.take_along_axis(keys, order[:, -1:], axis=1)[:, 0]
    places = np.take_along_axis(places, order, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # a title left out has a key above ln(bound); the margin is far wider than what rounding can do to either
        proven = usable & (last + 1e-9 * (1.0 + np.abs(last)) < np.log(bound) - shift)
        chosen = utilities.ravel()[places] - shift[:, None]
        masses = _masses_left(weights, places)
        proven &= (masses > SMALLEST).all(axis=1) & (masses < LARGEST).all(axis=1)
        np.minimum(chosen - np.log(masses), 0.0, out=out.log_propensities)
    np.subtract(places, n_titles * np.arange(n)[:, None], out=out.titles)
    return proven


def _bound(ratios: FloatArray, candidates: int) -> FloatArray:
    """(n,) a value with at least ``candidates`` ratios of each row at or below it, and few more.

    It is the ``candidates``-th smallest of the minima of groups, four times as many or more: taking minima is many
    times cheaper than partitioning whole rows.
    """
    n, n_titles = ratios.shape
    members = min(32, n_titles // (4 * candidates))
    groups = ratios
    if members > 1:
        width = n_titles // members
        groups = ratios[:, : members * width].reshape(n, members, width).min(axis=1)
        groups = np.concatenate([groups, ratios[:, members * width :]], axis=1)
    return np.partition(groups, candidates - 1, axis=1)[:, candidates - 1]


def _keys_of_candidates(
    utilities: FloatArray, uniforms: FloatArray, flat: Titles, least: int
) -> tuple[FloatArray, Titles]:
    """Keys of the titles at flat places, the first to be chosen smallest: (n, widest row or ``least``) and their
    places; padded with inf and the row's first place."""
    n, n_titles = utilities.shape
    row = flat // n_titles
    counts = np.bincount(row, minlength=n)
    width = max(int(counts.max()), least)
    slots = np.arange(len(flat)) + (width * np.arange(n) - np.cumsum(counts) + counts)[row]
    keys, places = np.full(n * width, np.inf), np.repeat(n_titles * np.arange(n), width)
    keys[slots] = np.log(-np.log(uniforms.ravel()[flat])) - utilities.ravel()[flat]
    places[slots] = flat
    return keys.reshape(n, width), places.reshape(n, width)


def _masses_left(weights: FloatArray, places: Titles) -> FloatArray:
    """(n, k) sums of the weights left to each choice, the chosen one included; takes the chosen out of ``weights``."""
    n, length = places.shape
    masses = np.empty((n, length + 1))
    masses[:, 1:] = weights.ravel()[places[:, ::-1]]
    weights.ravel()[places] = 0.0
    masses[:, 0] = weights.sum(axis=1)
    return np.cumsum(masses, axis=1)[:, :0:-1]


def _by_sorting(utilities: FloatArray, uniforms: FloatArray, length: int) -> Choices:
    """The definition, in logarithms throughout."""
    keys = np.log(-np.log(uniforms)) - utilities
    top = np.argpartition(keys, length - 1, axis=1)[:, :length]
    order = np.argsort(np.take_along_axis(keys, top, axis=1), axis=1)
    titles = np.take_along_axis(top, order, axis=1)
    chosen = np.take_along_axis(utilities, titles, axis=1)
    not_chosen = np.array(utilities)
    np.put_along_axis(not_chosen, titles, -np.inf, axis=1)
    rest = _log_sum_exp(not_chosen)
    _refuse_impossible(np.column_stack([chosen, np.where(np.isneginf(rest), 0.0, rest)]))
    return Choices(titles, chosen - _log_masses_left(rest, chosen))


# --------------------------------------------------------------------------------------------- a few uniforms an event


def draws_a_round(length: int) -> int:
    """How many titles `inverse_cdf` draws with replacement in a round, for sequences of up to ``length``: enough that
    one round serves most users of a catalogue with a few popular titles."""
    return length + length // 4 + 4


def inverse_cdf(
    utilities: NDArray[np.floating],
    uniforms: Callable[[int, Titles], FloatArray],
    length: int,
    exact: Callable[[Titles, Titles], FloatArray] | None = None,
) -> Choices:
    """Titles drawn with replacement, repeats skipped, which is a Plackett–Luce sequence.

    Weights stand in blocks of about sqrt(I) titles: one uniform chooses the block by its sum, another the title
    within it. Draws come in rounds. After a round its titles leave the catalogue and the sums of their blocks are
    taken anew; users who are still short draw again from what is left. A round brings at least one title, so peaked
    utilities need at most ``length`` rounds.

    Weights are float32, each relative to the largest of its own block, and sums of blocks float64. A cumulative sum
    in float32 over the catalogue would have gaps: titles smaller than its rounding are never drawn. Here cumulative
    sums are float64, and where chosen titles leave only what float32 cannot hold beside them, the block is weighed
    anew. Relative errors of propensities and of frequencies stay near 1e-6.

    Args:
        utilities: (n, I) float64, or float32 if ``exact`` is given; -inf for a title that cannot be chosen.
        uniforms: called with a round, from 0, and the (r,) rows that draw in it; returns (r, m, 2) uniforms in
            (0, 1), m the same in every call, which must depend on nothing but the user and the round. With m taken
            from the longest sequence ever asked for (`draws_a_round`), shorter ones are its beginning.
        length: k, at most as many as can be chosen.
        exact: float64 utilities of rows and titles that broadcast against each other, for the few for which float32
            is not enough: chosen ones, and blocks that are weighed anew.

    Raises:
        ConfigError: a row with fewer than ``length`` titles to choose from, or with a utility that is not a number.
    """
    n, n_titles = utilities.shape
    _refuse_length(length, n_titles)
    exact = exact or (lambda rows, titles: utilities[rows, titles].astype(np.float64))
    catalogue = _Blocks(utilities, exact)
    titles = np.full((n, length), n_titles, dtype=np.int64)  # padded with a title that is in no block
    have = np.zeros(n, dtype=np.int64)
    for turn in range(length):
        short = np.flatnonzero(have < length)
        if len(short) == 0:
            break
        drawn = catalogue.draw(short, uniforms(turn, short))
        first = _first_occurrences(drawn)
        rank = np.cumsum(first, axis=1) - 1 + have[short][:, None]
        new = first & (rank < length)
        rows = np.broadcast_to(short[:, None], drawn.shape)[new]
        titles[rows, rank[new]] = drawn[new]
        have[short] += new.sum(axis=1)
        catalogue.remove(rows, drawn[new], titles)
    chosen = exact(np.arange(n)[:, None], titles)
    rest = _log_sum_exp(catalogue.log_masses())
    return Choices(titles, chosen - _log_masses_left(rest, chosen))


class _Blocks:
    """The weights of n users' catalogues, in blocks: (n, B, S) float32, each block relative to its own ``shift``."""

    def __init__(self, utilities: NDArray[np.floating], exact: Callable[[Titles, Titles], FloatArray]) -> None:
        n, n_titles = utilities.shape
        self.n_titles, self.exact = n_titles, exact
        self.size = _PART * math.ceil(math.sqrt(n_titles) / _PART)
        self.n_blocks = math.ceil(n_titles / self.size)
        self.weights = np.empty((n, self.n_blocks, self.size), dtype=np.float32)
        self.shift = np.empty((n, self.n_blocks))
        self.sums = np.empty((n, self.n_blocks))
        whole = n_titles // self.size
        self._weigh(slice(0, whole), utilities[:, : whole * self.size].reshape(n, whole, self.size))
        if whole < self.n_blocks:
            self.weights[:, whole:] = 0.0
            self._weigh(slice(whole, None), utilities[:, None, whole * self.size :])

    def _weigh(self, blocks: slice, utilities: NDArray[np.floating]) -> None:
        """Fills the weights of some blocks from (n, b, s) utilities."""
        top = utilities.max(axis=2).astype(np.float64)
        if not (top < np.inf).all():
            raise ConfigError("utilities must be numbers below infinity, got NaN or inf for some title")
        shift = _shift(top, UNSHIFTED_BLOCK)
        weights = self.weights[:, blocks, : utilities.shape[2]]
        np.exp(_shifted(utilities, shift, weights), out=weights, dtype=np.float32, casting="same_kind")
        self.shift[:, blocks] = shift
        self.sums[:, blocks] = weights.sum(axis=2)

    def log_masses(self, rows: Titles | slice = slice(None)) -> FloatArray:
        """(r, B) logarithms of the blocks' sums."""
        with np.errstate(divide="ignore"):
            return np.log(self.sums[rows]) + self.shift[rows]

    def draw(self, rows: Titles, u: FloatArray) -> Titles:
        """(r, m) titles drawn with replacement by (r, m, 2) uniforms."""
        log_masses = self.log_masses(rows)
        top = log_masses.max(axis=1, keepdims=True)
        if np.isneginf(top).any():
            raise ConfigError("a user has fewer titles to choose from than the length of the sequence")
        block, _ = _search(np.exp(log_masses - top), u[..., 0])
        inside = self.weights[rows[:, None], block].reshape(block.size, -1, _PART)
        part, share = _search(inside.sum(axis=2).astype(np.float64), u[..., 1].reshape(-1, 1))
        place, _ = _search(inside[np.arange(block.size), part[:, 0]].astype(np.float64), share)
        return block * self.size + (part * _PART + place).reshape(block.shape)

    def remove(self, rows: Titles, titles: Titles, chosen: Titles) -> None:
        """Takes titles out, one of each row named, and sums their blocks anew; ``chosen`` (n, k) has all removed."""
        block = titles // self.size
        self.weights[rows, block, titles % self.size] = 0.0
        touched = np.unique(rows * self.n_blocks + block)
        rows, block = touched // self.n_blocks, touched % self.n_blocks
        sums = self.weights[rows, block].sum(axis=1)
        self.sums[rows, block] = sums
        small = sums < SMALLEST_BLOCK
        if small.any():
            self._weigh_anew(rows[small], block[small], chosen)

    def _weigh_anew(self, rows: Titles, block: Titles, chosen: Titles) -> None:
        """Weighs single blocks relative to the largest of what is left in them."""
        places = block[:, None] * self.size + np.arange(self.size)
        left = self.exact(rows[:, None], np.minimum(places, self.n_titles - 1))
        left[places >= self.n_titles] = -np.inf
        gone = chosen[rows] - block[:, None] * self.size
        pair, which = np.nonzero((gone >= 0) & (gone < self.size))
        left[pair, gone[pair, which]] = -np.inf
        shift = left.max(axis=1)
        shift[np.isneginf(shift)] = 0.0
        weights = np.exp((left - shift[:, None]).astype(np.float32))
        self.weights[rows, block] = weights
        self.shift[rows, block] = shift
        self.sums[rows, block] = weights.sum(axis=1)


def _search(weights: FloatArray, u: FloatArray) -> tuple[Titles, FloatArray]:
    """Draws places by weight: (r, m) of (r, w) weights and (r, m) uniforms; and what is left of each uniform.

    The place is the first whose cumulative sum exceeds ``u`` times the row's total. Exceeds and not reaches: a place
    without weight is never drawn. How far into its place a uniform fell is a uniform again. Bisection by hand, since
    NumPy searches one row a call.
    """
    n, width = weights.shape
    cumulative = np.cumsum(weights, axis=1)
    total = cumulative[:, -1:]
    targets = np.minimum(u * total, np.nextafter(total, 0.0))
    offsets = width * np.arange(n)[:, None]
    flat = cumulative.ravel()
    low = np.zeros(targets.shape, dtype=np.int64)
    high = np.full(targets.shape, width - 1)
    for _ in range((width - 1).bit_length()):
        middle = (low + high) // 2
        above = flat[offsets + middle] > targets
        high = np.where(above, middle, high)
        low = np.where(above, low, np.minimum(middle + 1, high))
    before = np.where(low > 0, flat[offsets + np.maximum(low - 1, 0)], 0.0)
    return low, (targets - before) / (flat[offsets + low] - before)


def _first_occurrences(titles: Titles) -> NDArray[np.bool_]:
    """(n, m) whether each title stands in its row for the first time."""
    order = np.argsort(titles, axis=1, kind="stable")
    ordered = np.take_along_axis(titles, order, axis=1)
    first = np.ones(titles.shape, dtype=bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first


# ------------------------------------------------------------------------------------------------- a choice at a time


def stepwise(
    utilities: FloatArray,
    uniforms: FloatArray,
    length: int,
    carry: Callable[[int, Titles], FloatArray | None] | None = None,
) -> Choices:
    """One choice after another, each by inverse CDF over what is left; utilities may change after each choice.

    Args:
        utilities: (n, I) float64; -inf for a title that cannot be chosen.
        uniforms: (n, at least ``length``) in (0, 1), one a choice.
        length: k, at most as many as can be chosen.
        carry: called before each choice but the first with its number and the (n, choices so far) titles; returns
            what is added to the utilities for this choice alone, (n, I) or None.

    Raises:
        ConfigError: a row with fewer than ``length`` titles to choose from, or with a utility that is not a number.
    """
    n, n_titles = utilities.shape
    _refuse_length(length, n_titles)
    left = np.array(utilities, dtype=np.float64)
    size = math.ceil(math.sqrt(n_titles))
    n_blocks = math.ceil(n_titles / size)
    weights = np.zeros((n, n_blocks * size))
    blocks = weights.reshape(n, n_blocks, size)
    rows = np.arange(n)
    out = Choices(np.empty((n, length), dtype=np.int64), np.empty((n, length)))
    for step in range(length):
        added = carry(step, out.titles[:, :step]) if carry is not None and step > 0 else None
        now = left if added is None else left + added
        top = now.max(axis=1, keepdims=True)
        _refuse_impossible(top)
        np.subtract(now, top, out=weights[:, :n_titles])
        np.exp(weights[:, :n_titles], out=weights[:, :n_titles])
        sums = blocks.sum(axis=2)
        block, share = _search(sums, uniforms[:, step, None])
        place, _ = _search(blocks[rows, block[:, 0]], share)
        title = (block * size + place)[:, 0]
        out.titles[:, step] = title
        log_weight = now[rows, title] - top[:, 0]
        out.log_propensities[:, step] = np.minimum(log_weight - np.log(sums.sum(axis=1)), 0.0)
        left[rows, title] = -np.inf
    return out


# ------------------------------------------------------------------------------------------------------------- inside


def _log_masses_left(rest: FloatArray, chosen: FloatArray) -> FloatArray:
    """(n, k) log-sums left to each choice, the chosen one included: of what was never chosen and what came later."""
    return np.logaddexp.accumulate(np.concatenate([rest[:, None], chosen[:, ::-1]], axis=1), axis=1)[:, :0:-1]


def _log_sum_exp(values: FloatArray) -> FloatArray:
    """(n,) of (n, I); -inf for a row of nothing but -inf."""
    top = values.max(axis=1)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(values - safe[:, None]).sum(axis=1))


def _shift(top: FloatArray, unshifted: float) -> FloatArray:
    """What to subtract from utilities before they are exponentiated: nothing from most, since 0 costs no pass."""
    return np.where((np.abs(top) <= unshifted) | ~np.isfinite(top), 0.0, top)


def _shifted(utilities: NDArray[Any], shift: FloatArray, out: NDArray[Any]) -> NDArray[Any]:
    """Utilities less the shift of their row, in ``out`` if need be; subtracting 0 changes no bit, so a row's result
    does not depend on whether another row needs a shift."""
    if not shift.any():
        return utilities
    return np.subtract(utilities, shift[..., None], out=out, casting="same_kind")


def _refuse_length(length: int, n_titles: int) -> None:
    if not 1 <= length <= n_titles:
        raise ConfigError(f"a sequence without repeats over {n_titles} titles has 1 to {n_titles}, got {length}")


def _refuse_impossible(chosen: FloatArray) -> None:
    if np.isneginf(chosen).any():
        raise ConfigError("a user has fewer titles to choose from than the length of the sequence")
    if not np.isfinite(chosen).all():
        raise ConfigError("utilities must be numbers below infinity, got NaN or inf for some title")
