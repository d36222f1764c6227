"""Leave-one-out and its baselines against plain Python, on random sequences and on MovieLens-100K."""

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recsim_gr.backbones import HSTUConfig, SASRecConfig, new_backbone
from recsim_gr.errors import ConfigError, DataFileError
from recsim_gr.histories import Histories
from recsim_gr.leave_one_out import HeldOut, LeaveOneOut, backbone_scorer, held_out_nll, ranking_figures, ranks
from recsim_gr.neighbours import ItemKNN, KNNChoice, KNNGrid, best_item_knn, popularity, similarities
from recsim_gr.randomness import generator
from recsim_gr.sequences import Sequences, read_sequences

MOVIELENS_SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"


def sequences_of(histories: list[list[int]], n_titles: int) -> Sequences:
    """Sequences with an event an hour."""
    lengths = [len(own) for own in histories]
    titles = np.array([title for own in histories for title in own], dtype=np.int64)
    return Sequences(
        starts=np.append(0, np.cumsum(lengths)).astype(np.int64),
        titles=titles,
        scores=np.full(len(titles), 3.0, dtype=np.float32),
        hours=np.array([float(k) for own in histories for k in range(len(own))]),
        user_names=pa.array([str(u) for u in range(len(histories))]),
        title_names=pa.array([str(i) for i in range(n_titles)]),
        has_ratings=False,
        sha256="0" * 64,
    )


@st.composite
def some_histories(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Histories of up to nine events, one of them long enough to be tested, without repeats."""
    n_titles = draw(st.integers(4, 12))
    own = st.lists(st.integers(0, n_titles - 1), min_size=1, max_size=9, unique=True)
    histories = draw(st.lists(own, min_size=1, max_size=8))
    return [*histories, draw(st.permutations(range(n_titles)))[:4]], n_titles


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_histories(), st.integers(2, 6))
def test_the_split_is_what_the_field_means(drawn: tuple[list[list[int]], int], length: int) -> None:
    histories, n_titles = drawn
    split = LeaveOneOut(sequences_of(histories, n_titles))
    tested = [own for own in histories if len(own) >= 3]
    assert split.left_out == len(histories) - len(tested)
    for held_out, back in ((split.validation, 2), (split.test, 1)):
        assert held_out.titles.tolist() == [own[-back] for own in tested]
        rows, titles = held_out.seen(slice(0, len(held_out)))
        found = [titles[rows == row].tolist() for row in range(len(held_out))]
        assert found == [own[:-back] for own in tested]
        contexts = held_out.contexts(slice(0, len(held_out)), length)
        for row, own in enumerate(tested):
            assert contexts.titles[row, : contexts.length[row]].tolist() == own[:-back][-length:]
    trained = [own[:-2] if len(own) >= 3 else own for own in histories]
    counted = Counter(title for own in trained for title in own)
    assert split.counts().tolist() == [counted[i] for i in range(n_titles)]
    assert split.n_training_events == sum(len(own) for own in trained)
    expected = []
    for own in trained:
        expected += [own[max(0, end - length) : end] for end in range(len(own), 0, -length)]
    windows = split.training_windows(length)
    assert [row[:n].tolist() for row, n in zip(windows.titles, windows.length, strict=True)] == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(some_histories(), st.integers(0, 10**6), st.booleans())
def test_ranks_equal_counting(drawn: tuple[list[list[int]], int], seed: int, exclude_seen: bool) -> None:
    histories, n_titles = drawn
    split = LeaveOneOut(sequences_of(histories, n_titles))
    table = generator(seed, "scores").integers(0, 3, size=(len(split.test), n_titles)).astype(float)  # many ties

    def score(held_out: HeldOut, rows: slice) -> NDArray[np.float64]:
        return table[rows]

    found = ranks(score, split.test, exclude_seen)
    for row, own in enumerate([own for own in histories if len(own) >= 3]):
        seen = set(own[:-1]) if exclude_seen else set()
        before = [i for i in range(n_titles) if (-table[row, i], i) < (-table[row, own[-1]], own[-1])]
        assert found[row] == 1 + len(set(before) - seen)


def test_figures_of_ranks_by_hand() -> None:
    found = ranking_figures(np.array([1, 3, 11, 2]))
    assert found["HR@10"].mean == pytest.approx(3 / 4)
    assert found["NDCG@10"].mean == pytest.approx((1 + 1 / math.log2(4) + 0 + 1 / math.log2(3)) / 4)
    assert found["MRR"].mean == pytest.approx((1 + 1 / 3 + 1 / 11 + 1 / 2) / 4)
    assert found["HR@10"].error == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)
    assert math.isnan(ranking_figures(np.array([4]))["MRR"].error)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(some_histories(), st.integers(1, 5), st.sampled_from([0.0, 2.5]), st.integers(0, 3), st.sampled_from([1.0, 0.5]))
def test_item_knn_equals_plain_python(
    drawn: tuple[list[list[int]], int], k: int, shrinkage: float, memory: int, decay: float
) -> None:
    histories, n_titles = drawn
    split = LeaveOneOut(sequences_of(histories, n_titles))
    trained = [set(own[:-2] if len(own) >= 3 else own) for own in histories]
    have = [{u for u, own in enumerate(trained) if i in own} for i in range(n_titles)]

    def alike(i: int, j: int) -> float:
        both = len(have[i] & have[j])
        return both / (math.sqrt(len(have[i]) * len(have[j])) + shrinkage) if both and i != j else 0.0

    (_, found), *_ = similarities(split, (k,), shrinkage)
    scores = ItemKNN(found, memory, decay)(split.test, slice(0, len(split.test)))
    for row, own in enumerate([own for own in histories if len(own) >= 3]):
        expected = np.zeros(n_titles)
        for age, j in enumerate(own[-2::-1]):
            for i in sorted(range(n_titles), key=lambda i: (-alike(j, i), i))[:k]:
                expected[i] += decay**age * alike(j, i) if memory == 0 or age < memory else 0.0
        assert scores[row] == pytest.approx(expected)


def test_item_knn_is_chosen_on_validation() -> None:
    rng = generator(3, "users who go round a ring")
    starts = rng.integers(0, 20, size=40)
    split = LeaveOneOut(sequences_of([[int(s + k) % 20 for k in range(6)] for s in starts], 20))
    grid = KNNGrid(neighbours=(1, 2, 19), shrinkage=(0.0, 5.0), memory=(1, 3, 0), decay=(1.0, 0.5))
    chosen, choice = best_item_knn(split, grid)

    def validation(scorer: Any) -> float:
        return ranking_figures(ranks(scorer, split.validation))["NDCG@10"].mean

    found = {
        KNNChoice(k, shrinkage, memory, decay): validation(ItemKNN(alike, memory, decay))
        for shrinkage in grid.shrinkage
        for k, alike in similarities(split, grid.neighbours, shrinkage)
        for memory in grid.memory
        for decay in grid.decay
    }
    assert len(found) == 36
    assert found[choice] == validation(chosen) == max(found.values()) > min(found.values())
    assert validation(popularity(split.counts())) < found[choice]


@pytest.mark.parametrize("config", [HSTUConfig(max_length=5, dimensions=8), SASRecConfig(max_length=5, dimensions=8)])
def test_held_out_nll_equals_a_softmax_of_each_user_alone(config: HSTUConfig | SASRecConfig) -> None:
    rng = generator(5, "histories")
    histories = [rng.permutation(12)[:n].tolist() for n in (3, 9, 4, 12)]
    split = LeaveOneOut(sequences_of(histories, 12))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = new_backbone(config, 12)
    backbone.train()
    found = held_out_nll(backbone, split.test)
    assert backbone.training
    backbone.eval()
    total, rank = 0.0, []
    for own in histories:
        last = own[:-1][-4:]  # four events and the opening token fill five positions
        titles, scores = torch.tensor([last]), torch.full((1, len(last)), 3.0)
        times = torch.arange(len(last), dtype=torch.float32)[None]
        with torch.no_grad():
            logits = backbone.logits(backbone.encode(titles, scores, times)[0, -1]).double()
        logits[own[:-1]] = -torch.inf
        total -= torch.log_softmax(logits, dim=0)[own[-1]].item()
        rank.append(int((logits > logits[own[-1]]).sum()) + 1)
    assert found == pytest.approx(total / 4, rel=1e-5)
    assert ranks(backbone_scorer(backbone), split.test).tolist() == rank


def test_some_users_are_spaced_evenly() -> None:
    split = LeaveOneOut(sequences_of([[u, u + 1, u + 2] for u in range(7)], 9))
    assert split.test.some(3).users.tolist() == [0, 3, 6]
    assert split.test.some(3).titles.tolist() == [2, 5, 8]
    assert split.test.some(7).users.tolist() == split.test.users.tolist()


def test_windows_can_be_trained_on() -> None:
    split = LeaveOneOut(sequences_of([[0, 1, 2, 3, 4, 5, 6], [3, 2]], 7))
    histories = Histories(split.training_windows(2))
    assert histories.n_titles == 7
    assert histories.titles.tolist() == [[3, 4], [1, 2], [0, 7], [3, 2]]


def test_mistakes() -> None:
    with pytest.raises(DataFileError, match="no user has 3 events"):
        LeaveOneOut(sequences_of([[0, 1], [2]], 3))
    with pytest.raises(ConfigError, match="windows must have 2 events"):
        LeaveOneOut(sequences_of([[0, 1, 2]], 3)).training_windows(1)


# -- the real file -----------------------------------------------------------------------------------------------


def test_movielens_is_read_as_it_is(movielens: Path) -> None:
    found = read_sequences(movielens)
    assert found.sha256 == MOVIELENS_SHA256
    assert (len(found), found.n_titles, found.n_events, found.left_out) == (943, 1682, 100_000, 0)
    assert found.lengths.max() == 737
    assert np.median(found.lengths) == 65
    assert found.scores.mean() == pytest.approx(3.530, abs=5e-4)


def test_popularity_on_movielens_equals_plain_python(movielens: Path) -> None:
    events: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    order: dict[str, int] = {}  # of equally popular titles, the one that the file names first
    with movielens.open() as file:
        next(file)
        for number, line in enumerate(file):
            user, title, _, timestamp = line.split("\t")
            events[user].append((float(timestamp), number, title))
            order.setdefault(title, len(order))
    histories = [[title for *_, title in sorted(own)] for own in events.values()]
    counted = Counter(title for own in histories for title in own[:-2])
    hits = 0
    for own in histories:
        place = {title: (-counted[title], order[title]) for title in order.keys() - set(own[:-1])}
        hits += sum(other < place[own[-1]] for other in place.values()) < 10
    split = LeaveOneOut(read_sequences(movielens))
    found = ranking_figures(ranks(popularity(split.counts()), split.test))["HR@10"].mean
    assert found == pytest.approx(hits / 943)
    assert found == pytest.approx(0.0859, abs=5e-5)
