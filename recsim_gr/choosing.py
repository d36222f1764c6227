"""What users choose: the samplers, run over the users of a world a block at a time.

Memory is bounded by the block, whatever the catalogue and however many users; blocks change no result.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsim_gr.behaviour import LARGE_CATALOGUE, FloatArray, Users
from recsim_gr.randomness import uniforms
from recsim_gr.sampling import BLOCK_CELLS, Choices, GumbelBuffers, draws_a_round, gumbel, inverse_cdf, stepwise

if TYPE_CHECKING:
    from recsim_gr.world_base import WorldBase

LEAST_BLOCK_USERS = 16
"""The fewest users for whom titles are chosen at a time: fewer would pay more for the calls than for the work."""

Rows = Callable[[slice, NDArray[Any], NDArray[Any]], None]
"""Writes what users ``slice`` feel for each title into an (n, I) array; the second array is room to work in."""


class RoughUtilities(NamedTuple):
    """Utilities in float32, and single ones in float64.

    Attributes:
        fill: writes float32 utilities.
        exact: float64 utilities of users (by their place) and titles that broadcast against each other.
    """

    fill: Rows
    exact: Callable[[NDArray[np.int64], NDArray[np.int64]], FloatArray]


def choose(world: "WorldBase", users: Users, hours: FloatArray) -> Choices:
    """Titles and log-propensities, (n, T) each, by the sampler of the config, a block of users at a time."""
    name = world.config.sampler
    if name == "auto":
        large = world.n_titles > LARGE_CATALOGUE
        name = "stepwise" if world.config.order_effect > 0 else "inverse_cdf" if large else "gumbel"
    sampler = {"gumbel": _by_gumbel, "inverse_cdf": _by_inverse_cdf, "stepwise": _by_steps}[name]
    return sampler(world, users, hours)


def _by_gumbel(world: "WorldBase", users: Users, hours: FloatArray) -> Choices:
    size, utilities = _block_users(world), world.utility_rows(users)
    buffers = GumbelBuffers.of(min(len(users), size), world.n_titles)
    chosen = []
    for start in range(0, len(users), size):
        part = slice(start, min(start + size, len(users)))
        room = buffers.rows(part.stop - start)
        uniforms(world.config.seed, "choice", users[part], world.n_titles, out=room.uniforms)
        utilities(part, room.utilities, room.ratios)
        chosen.append(gumbel(room.utilities, room.uniforms, hours.shape[1], room))
    return Choices.joined(chosen)


def _by_inverse_cdf(world: "WorldBase", users: Users, hours: FloatArray) -> Choices:
    per_round = draws_a_round(world.config.history_length + 1)
    rough = world.rough_utilities(users)

    def of_block(part: slice, utilities: NDArray[Any]) -> Choices:
        def draw(turn: int, rows: NDArray[np.int64]) -> FloatArray:
            u = uniforms(world.config.seed, f"choice, round {turn}", users[part][rows], 2 * per_round)
            return u.reshape(len(rows), per_round, 2)

        exact = (lambda rows, titles: rough.exact(part.start + rows, titles)) if rough else None
        return inverse_cdf(utilities, draw, hours.shape[1], exact)

    return _in_blocks(world, users, of_block, rough)


def _by_steps(world: "WorldBase", users: Users, hours: FloatArray) -> Choices:
    def of_block(part: slice, utilities: FloatArray) -> Choices:
        times = hours[part].astype(np.float32).astype(np.float64)  # a log's hours, so that it explains its choices

        def carry(step: int, titles: NDArray[np.int64]) -> FloatArray:
            return world.carry_over(titles, times[:, :step], times[:, step])

        u = uniforms(world.config.seed, "choice in steps", users[part], world.config.history_length + 1)
        return stepwise(utilities, u, times.shape[1], carry if world.config.order_effect > 0 else None)

    return _in_blocks(world, users, of_block)


def _in_blocks(
    world: "WorldBase",
    users: Users,
    of_block: Callable[[slice, NDArray[Any]], Choices],
    rough: RoughUtilities | None = None,
) -> Choices:
    """``of_block`` of each block of users and its utilities, whose memory is used again for the next."""
    size, fill = _block_users(world), rough.fill if rough else world.utility_rows(users)
    shape = (2, min(len(users), size), world.n_titles)
    out, scratch = np.empty(shape, dtype=np.float32 if rough else np.float64)
    chosen = []
    for start in range(0, len(users), size):
        part = slice(start, min(start + size, len(users)))
        n = part.stop - start
        fill(part, out[:n], scratch[:n])
        chosen.append(of_block(part, out[:n]))
    return Choices.joined(chosen)


def _block_users(world: "WorldBase") -> int:
    """Users for whom titles are chosen at a time; changes no result."""
    return max(LEAST_BLOCK_USERS, BLOCK_CELLS // world.n_titles)
