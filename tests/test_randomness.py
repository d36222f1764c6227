"""Counter-based random numbers: what a user gets depends on (seed, purpose, user) and on nothing else."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from recsim_gr import randomness
from recsim_gr.randomness import derived_seed, generator, stream_key, uniforms

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)

seeds = st.integers(0, 2**63)
purposes = st.sampled_from(["taste", "choice", "noise", "times"])
user_ids = st.integers(0, 4_000_000_000)
widths = st.integers(1, 21)


def one_user(seed: int, purpose: str, user: int, per_user: int) -> NDArray[np.float64]:
    return uniforms(seed, purpose, np.array([user]), per_user)[0]


@PROPERTY
@given(seeds, purposes, st.lists(user_ids, min_size=1, max_size=20), widths)
def test_a_user_gets_the_same_numbers_whoever_else_asks(
    seed: int, purpose: str, users: list[int], per_user: int
) -> None:
    together = uniforms(seed, purpose, np.array(users), per_user)
    alone = [one_user(seed, purpose, user, per_user) for user in users]
    np.testing.assert_array_equal(together, alone)


@PROPERTY
@given(seeds, user_ids, st.integers(1, 40), widths, st.data())
def test_neither_chunks_nor_order_nor_repeats_matter(
    seed: int, first: int, n: int, per_user: int, data: st.DataObject
) -> None:
    users = np.arange(first, first + n)
    whole = uniforms(seed, "choice", users, per_user)
    chunk = data.draw(st.integers(1, n), label="chunk")
    chunks = [uniforms(seed, "choice", users[i : i + chunk], per_user) for i in range(0, n, chunk)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=2 * n), label="rows"))
    np.testing.assert_array_equal(uniforms(seed, "choice", users[rows], per_user), whole[rows])


@PROPERTY
@given(seeds, purposes, user_ids, widths)
def test_the_numbers_are_those_of_philox(seed: int, purpose: str, user: int, per_user: int) -> None:
    # Straight from the definition: the key is 16 bytes of BLAKE2b of "seed/purpose"; a counter gives 4 words;
    # a user owns ceil(per_user / 4) counters; a word w becomes (w >> 11)·2^-53 + 2^-54, at most the float
    # below 1.
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    counters = (per_user + 3) // 4
    philox = np.random.Philox(key=key, counter=user * counters)
    words = philox.random_raw(per_user)
    expected = [min(float(int(word) >> 11) * 2.0**-53 + 2.0**-54, 1.0 - 2.0**-53) for word in words]
    assert one_user(seed, purpose, user, per_user).tolist() == expected


@PROPERTY
@given(seeds, user_ids, widths)
def test_a_user_does_not_share_a_stretch_with_a_neighbour(seed: int, user: int, per_user: int) -> None:
    # 53-bit numbers: among 3·21 of them a repeat by chance has probability 2e-13, an overlap of stretches
    # repeats
    stretches = uniforms(seed, "noise", np.arange(user, user + 3), per_user)
    assert len(np.unique(stretches)) == stretches.size


@PROPERTY
@given(seeds, user_ids, widths)
def test_purposes_and_seeds_are_other_numbers(seed: int, user: int, per_user: int) -> None:
    base = one_user(seed, "taste", user, per_user)
    assert not np.isin(base, one_user(seed, "pull", user, per_user)).any()
    assert not np.isin(base, one_user(seed + 1, "taste", user, per_user)).any()


@PROPERTY
@given(seeds, widths)
@example(0, 1)
def test_no_users_no_numbers(seed: int, per_user: int) -> None:
    assert uniforms(seed, "taste", np.empty(0, dtype=np.int64), per_user).shape == (0, per_user)


class EdgeBits:
    """A stand-in for NumPy's generator that returns the ends of its range, which no seed soon would."""

    def random(self, out: NDArray[np.float64]) -> None:
        out[:] = 0.0
        out[:, 1::2] = 1.0 - 2.0**-53


@pytest.mark.parametrize("per_user", [2, 4])
def test_the_interval_is_open_at_both_ends(monkeypatch: pytest.MonkeyPatch, per_user: int) -> None:
    monkeypatch.setattr(randomness, "_stream", lambda seed, purpose, counter: EdgeBits())
    ends = uniforms(0, "taste", np.arange(3), per_user)
    assert ((ends > 0.0) & (ends < 1.0)).all()
    assert np.isfinite(np.log(-np.log(ends))).all()  # Gumbel noise of either end


@PROPERTY
@given(seeds, st.lists(user_ids, min_size=1, max_size=8), widths)
def test_numbers_go_where_the_caller_wants_them(seed: int, users: list[int], per_user: int) -> None:
    out = np.full((len(users), per_user), np.nan)
    returned = uniforms(seed, "choice", np.array(users), per_user, out=out)
    assert returned is out
    np.testing.assert_array_equal(out, uniforms(seed, "choice", np.array(users), per_user))


def test_threads_do_not_share_a_generator() -> None:
    # Four threads drawing at once, in stretches long enough that NumPy lets go of the interpreter's lock.
    def draw(purpose: str) -> NDArray[np.float64]:
        return np.concatenate([uniforms(0, purpose, np.arange(i, i + 3), 4_000) for i in range(40)])

    names = ["taste", "pull", "noise", "times"]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, names))
    for purpose, drawn in zip(names, together, strict=True):
        np.testing.assert_array_equal(drawn, draw(purpose))


def test_numbers_are_uniform_within_a_user_and_across_users() -> None:
    u = uniforms(3, "taste", np.arange(4_000), 5)
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    # correlations of 4,000 independent pairs have a standard error of 1/sqrt(4,000) = .016; 4 of them
    assert np.abs(np.corrcoef(u.T) - np.eye(5)).max() < 4 / np.sqrt(4_000)
    neighbours = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(4_000)


def test_purposes_are_independent() -> None:
    names = ["taste", "pull", "choice", "noise", "times", "behaviour", "leniency"]
    u = np.stack([uniforms(0, name, np.arange(4_000), 4)[:, 0] for name in names])
    assert np.abs(np.corrcoef(u) - np.eye(len(names))).max() < 4 / np.sqrt(4_000)


@PROPERTY
@given(seeds)
def test_derived_seeds_are_63_bits_and_differ_by_purpose(seed: int) -> None:
    derived = [derived_seed(seed, purpose) for purpose in ("sb3", "minari", "obp")]
    assert all(0 <= value < 2**63 for value in derived)
    assert len(set(derived)) == 3
    assert derived == [derived_seed(seed, purpose) for purpose in ("sb3", "minari", "obp")]


@PROPERTY
@given(seeds)
def test_generators_repeat_and_differ_by_purpose(seed: int) -> None:
    first, again, other = (generator(seed, name).random(8) for name in ("traits", "traits", "quality"))
    np.testing.assert_array_equal(first, again)
    assert not np.isin(first, other).any()


def test_a_key_does_not_depend_on_the_integer_type_of_the_seed() -> None:
    np.testing.assert_array_equal(stream_key(np.int64(7), "taste"), stream_key(7, "taste"))  # type: ignore[arg-type]
