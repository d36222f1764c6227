"""Observations: padding, the seen mask, and one more event."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsim_gr.observations import Contexts, Observations, seen_mask

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def observations(draw: st.DrawFn) -> Observations:
    """Ragged contexts, from no event to nearly the whole catalogue, padded to any width that holds them."""
    n_titles = draw(st.integers(2, 8))
    lengths = draw(st.lists(st.integers(0, n_titles - 1), min_size=1, max_size=5))
    width = max(lengths) + draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    titles = np.full((len(lengths), width), n_titles, dtype=np.int64)
    scores, times = np.zeros(titles.shape, dtype=np.float32), np.zeros(titles.shape, dtype=np.float32)
    for row, length in enumerate(lengths):
        titles[row, :length] = rng.permutation(n_titles)[:length]
        scores[row, :length] = 1.0 + 4.0 * rng.random(length)
        times[row, :length] = np.cumsum(rng.random(length))
    epoch = rng.integers(4, size=len(lengths))
    return Observations(titles, scores, times, np.array(lengths, dtype=np.int64), epoch, n_titles)


def events(batch: Observations, row: int) -> list[tuple[int, float, float]]:
    """The real events of one context."""
    n = int(batch.length[row])
    return [(int(batch.titles[row, t]), float(batch.scores[row, t]), float(batch.times[row, t])) for t in range(n)]


def unseen_titles(batch: Observations) -> np.ndarray:
    """(n,) one title a context that is not in its history."""
    return np.argmin(batch.seen(), axis=1)


@PROPERTY
@given(observations())
def test_seen_is_the_set_of_the_history(batch: Observations) -> None:
    expected = [[i in batch.titles[row].tolist() for i in range(batch.n_titles)] for row in range(len(batch))]
    assert batch.seen().tolist() == expected
    assert batch.seen().sum(axis=1).tolist() == batch.length.tolist()


@PROPERTY
@given(observations())
def test_seen_does_not_depend_on_order_or_padding(batch: Observations) -> None:
    reversed_histories = np.pad(batch.titles[:, ::-1], ((0, 0), (2, 1)), constant_values=batch.n_titles)
    np.testing.assert_array_equal(seen_mask(reversed_histories, batch.n_titles), batch.seen())


def test_seen_of_an_empty_history() -> None:
    mask = seen_mask(np.empty((3, 0), dtype=np.int64), 4)
    assert mask.shape == (3, 4)
    assert not mask.any()


@PROPERTY
@given(observations(), st.floats(0.0, 100.0))
def test_append_adds_one_event_and_keeps_the_others(batch: Observations, gap: float) -> None:
    titles = unseen_titles(batch)
    scores = np.linspace(1.0, 5.0, len(batch)).astype(np.float32)
    before = [events(batch, row) for row in range(len(batch))]
    longer = batch.append(titles, scores, gap)
    for row, old in enumerate(before):
        last = old[-1][2] if old else 0.0
        new = (int(titles[row]), float(scores[row]), float(np.float32(np.float32(last) + gap)))
        assert events(longer, row) == [*old, pytest.approx(new, rel=1e-6)]
        assert events(batch, row) == old  # the observations that were there are untouched
        tail = int(longer.length[row])
        assert (longer.titles[row, tail:] == batch.n_titles).all()
        assert not longer.scores[row, tail:].any()
        assert not longer.times[row, tail:].any()
    assert longer.length.tolist() == (batch.length + 1).tolist()
    assert longer.titles.shape == (len(batch), batch.titles.shape[1] + 1)
    for name in ("titles", "scores", "times", "length", "epoch"):
        assert getattr(longer, name).dtype == getattr(batch, name).dtype, name
    assert longer.n_titles == batch.n_titles
    assert longer.epoch.tolist() == batch.epoch.tolist()


def test_append_by_hand() -> None:
    # two contexts over 3 titles, padding index 3: one of 2 events, the last at 1.5 h, and one of none
    batch = Observations(
        titles=np.array([[2, 0], [3, 3]]),
        scores=np.array([[4.0, 2.0], [0.0, 0.0]], dtype=np.float32),
        times=np.array([[0.5, 1.5], [0.0, 0.0]], dtype=np.float32),
        length=np.array([2, 0]),
        epoch=np.array([1, 1]),
        n_titles=3,
    )
    longer = batch.append(np.array([1, 2]), np.array([5.0, 3.0], dtype=np.float32), 1.0)
    assert longer.titles.tolist() == [[2, 0, 1], [2, 3, 3]]
    assert longer.scores.tolist() == [[4.0, 2.0, 5.0], [3.0, 0.0, 0.0]]
    assert longer.times.tolist() == [[0.5, 1.5, 2.5], [1.0, 0.0, 0.0]]
    assert longer.length.tolist() == [3, 1]


@PROPERTY
@given(observations(), st.data())
def test_rows_are_observations(batch: Observations, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=6)))
    part = batch[rows]
    assert len(part) == len(rows)
    assert [events(part, row) for row in range(len(part))] == [events(batch, int(row)) for row in rows]
    assert part.epoch.tolist() == batch.epoch[rows].tolist()
    assert part.n_titles == batch.n_titles
    cut = data.draw(st.integers(0, len(batch)))
    assert len(batch[:cut]) + len(batch[cut:]) == len(batch)
    mask = batch.length > 0
    assert len(batch[mask]) == mask.sum()


def test_observations_and_contexts_are_frozen() -> None:
    empty, zero = np.zeros((1, 0), dtype=np.float32), np.zeros(1, dtype=np.int64)
    batch = Observations(empty.astype(np.int64), empty, empty, zero, zero, n_titles=1)
    contexts = Contexts(batch, np.array([7]), np.array([0]), np.array([3.0], dtype=np.float32), zero.astype(np.float32))
    assert len(contexts) == len(batch) == 1
    with pytest.raises(FrozenInstanceError):
        batch.n_titles = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        contexts.users = np.array([8])  # type: ignore[misc]
