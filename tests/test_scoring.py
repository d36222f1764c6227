"""Scoring on a world of two users and four titles worked by hand, and what must hold in any world."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recsim_gr.agents import Oracle, ScoreOracle
from recsim_gr.catalogue import Catalogue
from recsim_gr.errors import PolicyError
from recsim_gr.metrics import top_k
from recsim_gr.noise import Scores, WatchTimeNoise
from recsim_gr.observations import Contexts, Observations
from recsim_gr.policy import ranking_scores
from recsim_gr.scoring import COLD_METRICS, METRICS, Examination, discounted_mean, evaluate, sample_titles
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

FloatArray = NDArray[np.float64]
Users = NDArray[np.int64]


class Table:
    """A world that is two tables; a shown title gets its expected score plus the last uniform drawn for it."""

    def __init__(self, satisfaction: Any, expected: Any) -> None:
        self.truth, self.scores = np.array(satisfaction, dtype=np.float64), np.array(expected, dtype=np.float64)
        self.asked = 0

    uniforms_per_exposure = WatchTimeNoise.uniforms_per_event

    def worth(self, users: Users) -> NDArray[np.float32]:
        self.asked += 1
        return self.truth[users].astype(np.float32)

    def satisfaction(self, users: Users) -> NDArray[np.float32]:
        return self.truth[users].astype(np.float32)

    def acceptance(self, users: Users) -> FloatArray:
        return np.ones((len(users), self.truth.shape[1]))

    def expected_score(self, users: Users) -> FloatArray:
        return self.scores[users]

    def logging_log_probs(
        self, users: Users, histories: NDArray[np.int64], times: Any = None, now: Any = None
    ) -> FloatArray:
        return masked_softmax(np.zeros((len(users), self.truth.shape[1])), histories)

    def sample_scores(self, users: Users, titles: NDArray[np.int64], u: FloatArray) -> Scores:
        assert u.shape == (len(users), self.uniforms_per_exposure)
        score = self.scores[users, titles] + u[:, -1]
        return Scores(score, np.ones(len(users)), np.zeros(len(users), dtype=bool))


class Fixed:
    """A policy of fixed utilities: it ignores scores, and never repeats a title."""

    def __init__(self, utilities: Any) -> None:
        with np.errstate(divide="ignore"):
            self.utilities = np.asarray(utilities, dtype=np.float64)

    def log_probs(self, observations: Observations) -> FloatArray:
        return masked_softmax(self.utilities[: len(observations)], observations.titles)


class Says:
    """An agent that answers with what it was given."""

    name = "Says"

    def __init__(self, log_probs: Any, scores: Any = None) -> None:
        self.answer = np.asarray(log_probs, dtype=np.float64)
        if scores is not None:
            self.scores = lambda observations: np.asarray(scores, dtype=np.float64)

    def log_probs(self, observations: Observations) -> FloatArray:
        return self.answer


def masked_softmax(utilities: FloatArray, histories: NDArray[np.int64]) -> FloatArray:
    """(n, I) log-probabilities over titles that stand in no history."""
    masked = np.pad(utilities, ((0, 0), (0, 1)))
    np.put_along_axis(masked, histories, -np.inf, axis=1)
    masked = masked[:, :-1]
    return np.asarray(masked - np.logaddexp.reduce(masked, axis=1, keepdims=True))


def contexts_of(
    histories: list[list[int]], n_titles: int, scores: Any = None, next_titles: Any = None, next_scores: Any = None
) -> Contexts:
    """Contexts of users 0, 1, … with these histories, of one length."""
    titles = np.array(histories, dtype=np.int64).reshape(len(histories), -1)
    shape = titles.shape
    unseen = [next(i for i in range(n_titles) if i not in history) for history in histories]
    observations = Observations(
        titles=titles,
        scores=np.full(shape, 3.0, dtype=np.float32) if scores is None else np.array(scores, dtype=np.float32),
        times=np.tile(np.arange(shape[1], dtype=np.float32), (shape[0], 1)),
        length=np.full(shape[0], shape[1]),
        epoch=np.zeros(shape[0], dtype=np.int64),
        n_titles=n_titles,
    )
    return Contexts(
        observations,
        np.arange(shape[0]),
        np.array(unseen if next_titles is None else next_titles),
        np.linspace(1, 5, shape[0]).astype(np.float32) if next_scores is None else np.array(next_scores, np.float32),
        np.full(shape[0], shape[1], dtype=np.float32),
    )


def log(rows: Any) -> FloatArray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, dtype=np.float64))


# -- by hand ------------------------------------------------------------------------------------------------------

TRUTH = [[1, 2, 3, 5], [4, 3, 2, 1]]
EXPECTED = [[2, 2, 4, 4], [3, 3, 1, 2]]
POLICY = [[0, 0.5, 0.25, 0.25], [0.2, 0.3, 0, 0.5]]


@pytest.fixture
def world() -> Table:
    return Table(TRUTH, EXPECTED)


@pytest.fixture
def contexts() -> Contexts:
    """User 0 saw title 0, user 1 title 2; they chose titles 2 and 0 next."""
    return contexts_of([[0], [2]], 4, scores=[[4], [2]], next_titles=[2, 0], next_scores=[3, 5])


def test_values_by_hand(world: Table, contexts: Contexts) -> None:
    got = evaluate(world, Says(log(POLICY)), contexts).metrics
    # user 0: ½·2 + ¼·3 + ¼·5 = 3; user 1: .2·4 + .3·3 + .5·1 = 2.2
    assert got["value_sampled"] == pytest.approx(2.6)
    # first titles: 1 (worth 2) and 3 (worth 1)
    assert got["value_greedy"] == pytest.approx(1.5)
    # three titles are left, and the list is all of them: (2 + 3 + 5)/3 and (4 + 3 + 1)/3
    assert got["value_top10"] == pytest.approx((10 / 3 + 8 / 3) / 2)
    # the two lists differ by 2/3: deviation (2/3)/√2, over √2
    assert got["value_top10_se"] == pytest.approx(1 / 3)
    # ½·2 + ¼·4 + ¼·4 = 3 and .2·3 + .3·3 + .5·2 = 2.5; 2 and 2; (2 + 4 + 4)/3 and (3 + 3 + 2)/3
    assert got["score_value_sampled"] == pytest.approx(2.75)
    assert got["score_value_greedy"] == pytest.approx(2.0)
    assert got["score_value_top10"] == pytest.approx(3.0)
    # the best unseen: 5 and 4
    assert got["regret_sampled"] == pytest.approx(4.5 - 2.6)
    assert got["regret_greedy"] == pytest.approx(4.5 - 1.5)
    assert got["regret_top10"] == pytest.approx(0.0)


def test_values_of_each_context_are_given_for_paired_comparisons(world: Table, contexts: Contexts) -> None:
    np.testing.assert_allclose(evaluate(world, Says(log(POLICY)), contexts).top10_values, [10 / 3, 8 / 3])


def test_support_by_hand(world: Table, contexts: Contexts) -> None:
    reference = Says(log([[0, 0.25, 0.5, 0.25], [0.2, 0.3, 0, 0.5]]))
    got = evaluate(world, Says(log(POLICY)), contexts, reference=reference).metrics
    # chosen next: title 2 at ¼ and title 0 at .2
    assert got["nll"] == pytest.approx((math.log(4) + math.log(5)) / 2)
    second = -(0.2 * math.log(0.2) + 0.3 * math.log(0.3) + 0.5 * math.log(0.5))
    assert got["entropy"] == pytest.approx((1.5 * math.log(2) + second) / 2)
    # ½ ln(½/¼) + ¼ ln(¼/½) = ¼ ln 2, and 0
    assert got["kl_ref"] == pytest.approx(0.25 * math.log(2) / 2)
    # μ uniform over 3: Σ π²/μ = 3(¼ + 1/16 + 1/16) = 9/8 and 3(.04 + .09 + .25) = 1.14
    assert got["effective_sample_size"] == pytest.approx(2 / (1.125 + 1.14))
    # lists of user 0: 1, 2, 3; of user 1: 3, 1, 0: counts 1, 2, 1, 2
    assert got["coverage"] == 1.0
    assert got["popularity_gini"] == pytest.approx(4 * 2 / (2 * 16 * 1.5))


def test_offline_metrics_by_hand(world: Table, contexts: Contexts) -> None:
    got = evaluate(world, Says(log(POLICY)), contexts).metrics
    # title 2 of user 0 shares ¼ with title 3 and has the lower index: rank 2; title 0 of user 1 comes third.
    # Above the median by mean score: user 0 (4 against 2); by truth: user 1 (2 against 1); by the next score: of
    # 3 and 5, less the lowest: weights 0 and 1.
    for suffix, rank in (("", 2), ("_true", 3), ("_own", 3)):
        assert got[f"ndcg10{suffix}"] == pytest.approx(1 / math.log2(1 + rank))
        assert got[f"hr10{suffix}"] == 1.0
        assert got[f"mrr{suffix}"] == pytest.approx(1 / rank)


def test_own_relevance_weighs_by_the_next_score() -> None:
    """Next scores 1, 2, 5 weigh 0, ¼, 1; the next titles have ranks 1, 1, 2: MRR (¼ + ½)/1.25 = .6."""
    three = contexts_of([[0], [0], [0]], 4, next_titles=[1, 1, 2], next_scores=[1, 2, 5])
    policy = Says(log([[0, 0.5, 0.3, 0.2]] * 3))
    got = evaluate(Table([[1, 2, 3, 4]] * 3, np.ones((3, 4))), policy, three).metrics
    assert got["mrr_own"] == pytest.approx(0.6)
    assert got["ndcg10_own"] == pytest.approx((0.25 + 1 / math.log2(3)) / 1.25)
    assert math.isnan(got["mrr"])  # all histories score the same: nobody is above the median


def test_rankings_may_differ_from_probabilities(world: Table, contexts: Contexts) -> None:
    """Its scores rank titles 3 and 0 first, worth 5 and 4; a seen title's score, however high, counts for nothing."""
    got = evaluate(world, Says(log(POLICY), [[9, 1, 2, 3], [3, 2, 9, 1]]), contexts).metrics
    assert got["value_greedy"] == pytest.approx(4.5)
    assert got["value_sampled"] == pytest.approx(2.6)
    assert got["mrr_own"] == pytest.approx(1.0)


def test_lists_are_ten_long_where_there_are_enough_titles() -> None:
    """Twelve titles worth 1 to 12 less the one seen; the policy ranks them downward: the mean of 12, …, 3."""
    utilities = np.arange(12.0)[None]
    got = evaluate(Table(utilities + 1, utilities), Fixed(utilities), contexts_of([[0]], 12)).metrics
    assert got["value_top10"] == pytest.approx(7.5)
    assert got["regret_top10"] == pytest.approx(0.0)
    assert got["score_value_top10"] == pytest.approx(6.5)
    assert got["coverage"] == pytest.approx(10 / 12)


def test_lists_are_cut_to_the_fewest_unseen_titles() -> None:
    """User 1 has one title left: both lists are one long, so no seen title is ever counted."""
    world = Table([[1, 2, 3], [1, 2, 3]], np.ones((2, 3)))
    both = contexts_of([[0, 0], [1, 2]], 3)
    policy = Says(log([[0, 0.9, 0.1], [1, 0, 0]]))
    got = evaluate(world, policy, both).metrics
    assert got["value_top10"] == got["value_greedy"] == pytest.approx(1.5)
    assert got["regret_top10"] == pytest.approx((3 + 1) / 2 - 1.5)


# -- rollouts -----------------------------------------------------------------------------------------------------


class TableJudge:
    """A judge of fixed scores that remembers what it was shown."""

    def __init__(self, scores: Any) -> None:
        self.scores = np.asarray(scores)
        self.shown: list[Any] = []

    def mean(self, *arguments: Any) -> NDArray[np.float32]:
        (observations,) = arguments
        self.shown.append(observations)
        return np.asarray(self.scores[: len(observations)])


def test_a_discounted_mean_by_hand() -> None:
    # (1 + .9·2 + .81·3) / (1 + .9 + .81) = 5.23/2.71
    assert discounted_mean([1.0, 2.0, 3.0]) == pytest.approx(5.23 / 2.71)
    assert discounted_mean([4.0, 4.0, 4.0]) == pytest.approx(4.0)
    assert discounted_mean([2.5]) == 2.5


def test_returns_by_hand(world: Table, contexts: Contexts) -> None:
    """A policy that takes the titles in order: 1, 2, 3 for user 0, and 0, 1, 3 for user 1."""
    policy = Fixed(-1e3 * np.tile(np.arange(4.0), (2, 1)))
    judge = TableJudge([[5, 1, 2, 3], [1, 1, 5, 4]])
    got = evaluate(world, policy, contexts, judge=judge).metrics
    norm = 1 + 0.9 + 0.81
    assert got["value_return"] == pytest.approx(((2 + 2.7 + 0.81 * 5) + (4 + 2.7 + 0.81 * 1)) / 2 / norm)
    assert got["score_return"] == pytest.approx(((2 + 3.6 + 0.81 * 4) + (3 + 2.7 + 0.81 * 2)) / 2 / norm)
    assert got["judge_return"] == pytest.approx(((1 + 1.8 + 0.81 * 3) + (1 + 0.9 + 0.81 * 4)) / 2 / norm)
    # the two users' are 5.23 and 5.14 over norm; two numbers' standard deviation is their distance over √2
    assert got["judge_return_sd"] == pytest.approx(0.09 / norm / np.sqrt(2))
    assert got["overoptimisation"] == pytest.approx(got["judge_return"] - got["score_return"])
    assert got["misalignment"] == pytest.approx(got["score_return"] - got["value_return"])
    # the judge's own scores were appended, 0.7 hours apart
    assert [observations.titles.tolist() for observations in judge.shown] == [
        [[0], [2]],
        [[0, 1], [2, 0]],
        [[0, 1, 2], [2, 0, 1]],
    ]
    np.testing.assert_allclose(judge.shown[2].scores, [[4, 1, 2], [2, 1, 1]])
    np.testing.assert_allclose(judge.shown[2].times, [[0, 0.7, 1.4]] * 2, rtol=1e-6)


def test_the_true_rollout_appends_scores_of_the_world(world: Table, contexts: Contexts) -> None:
    """They are the expected score plus a uniform: another at each event, the same for every policy."""
    seen: list[NDArray[np.float32]] = []

    class Watching(Fixed):
        def log_probs(self, observations: Observations) -> FloatArray:
            seen.append(observations.scores)
            return super().log_probs(observations)

    policy = Watching(-1e3 * np.tile(np.arange(4.0), (2, 1)))
    examination = Examination(world, contexts, TableJudge(np.zeros((2, 4))))
    examination.evaluate(policy)
    first = [scores for scores in seen if scores.shape[1] == 3]
    noise = first[1][:, 1:] - np.array([[2, 4], [3, 3]])  # after the judged rollout, whose scores are 0
    assert not first[0][:, 1:].any()
    assert ((noise > 0) & (noise < 1)).all()
    assert len(np.unique(noise)) == 4
    seen.clear()
    examination.evaluate(policy)
    np.testing.assert_array_equal([scores for scores in seen if scores.shape[1] == 3][1], first[1])


def test_agents_with_equal_probabilities_get_equal_rollouts() -> None:
    world = World(WorldConfig(n_titles=20, history_length=3))
    contexts, judge = world.contexts(30), TableJudge(np.random.default_rng(0).uniform(1, 5, size=(30, 20)))
    utilities = np.random.default_rng(1).standard_normal((30, 20))

    class Otherwise(Fixed):
        def scores(self, observations: Observations) -> FloatArray:
            return -self.log_probs(observations)

    examination = Examination(world, contexts, judge)
    one, two = examination.evaluate(Fixed(utilities)), examination.evaluate(Otherwise(utilities))
    again = Examination(world, contexts, judge).evaluate(Fixed(utilities))
    other = Examination(world, contexts, judge, seed=1).evaluate(Fixed(utilities))
    for name in ("judge_return", "score_return", "value_return"):
        assert one[name] == two[name] == again[name] != other[name]
    assert one["value_top10"] != two["value_top10"]
    assert one["value_sampled"] == other["value_sampled"]


def test_a_perfect_judge_of_a_policy_that_ignores_scores_is_not_overoptimised() -> None:
    world = World(WorldConfig(n_titles=15, history_length=4, reward_noise=0.7))
    contexts = world.contexts(50)
    judge = TableJudge(world.expected_score(contexts.users))
    got = evaluate(world, Fixed(np.random.default_rng(0).standard_normal((50, 15))), contexts, judge=judge)
    assert got["judge_return"] == pytest.approx(got["score_return"], abs=1e-6)
    assert got["overoptimisation"] == pytest.approx(0.0, abs=1e-6)
    assert got["misalignment"] != pytest.approx(0.0, abs=1e-3)


def test_rollouts_use_as_many_contexts_as_asked(contexts: Contexts, world: Table) -> None:
    judge = TableJudge(EXPECTED)
    policy = Fixed(-1e3 * np.tile(np.arange(4.0), (2, 1)))
    got = Examination(world, contexts, judge, rollout_contexts=1).evaluate(policy)
    assert {len(observations) for observations in judge.shown} == {1}
    assert got["value_return"] == pytest.approx((2 + 2.7 + 0.81 * 5) / 2.71)


def test_rollouts_end_with_the_last_unseen_title() -> None:
    world = Table([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    policy, judge = Fixed(np.zeros((1, 4))), TableJudge([[1, 2, 3, 4]])
    got = evaluate(world, policy, contexts_of([[0, 2, 3]], 4), judge=judge)
    assert got["value_return"] == got["judge_return"] == pytest.approx(2.0)


# -- sampling -----------------------------------------------------------------------------------------------------


def test_titles_come_as_often_as_they_should() -> None:
    probabilities = np.array([0.0, 0.15, 0.0, 0.6, 0.25, 0.0])
    n = 10_000
    u = (np.arange(n) + 0.5) / n  # an even grid: frequencies are exact to 1/n
    titles = sample_titles(np.tile(log(probabilities), (n, 1)), u)
    np.testing.assert_allclose(np.bincount(titles, minlength=6) / n, probabilities, atol=1 / n)


@PROPERTY
@given(st.integers(0, 2**32), st.integers(1, 30), st.floats(0, 0.9))
def test_a_title_without_weight_never_comes(seed: int, n_titles: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    utilities = 5 * rng.standard_normal((1, n_titles))
    utilities[:, 1:][rng.random((1, n_titles - 1)) < share] = -np.inf
    utilities = np.roll(utilities, rng.integers(n_titles), axis=1)
    log_probs = utilities - np.logaddexp.reduce(utilities, axis=1, keepdims=True)
    u = np.array([2.0**-54, 1e-9, 0.5, 1 - 1e-9, np.nextafter(1.0, 0.0), *rng.random(5)])
    titles = sample_titles(np.repeat(log_probs, len(u), axis=0), u)
    assert np.isfinite(log_probs[0, titles]).all()


# -- what must hold in any world ----------------------------------------------------------------------------------


@st.composite
def examinations(draw: st.DrawFn) -> tuple[Examination, Says]:
    """A random world, contexts with at least one unseen title, and a random policy with rankings of its own."""
    n, n_titles = draw(st.integers(1, 5)), draw(st.integers(2, 15))
    length = draw(st.integers(0, n_titles - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    truth, expected = rng.uniform(1, 5, size=(2, n, n_titles))
    histories = [list(rng.permutation(n_titles)[:length]) for _ in range(n)]
    contexts = contexts_of(histories, n_titles)
    spread = draw(st.sampled_from([0.1, 3.0, 100.0]))
    utilities = masked_softmax(spread * rng.standard_normal((n, n_titles)), contexts.observations.titles)
    policy = Says(utilities, rng.standard_normal((n, n_titles)) if draw(st.booleans()) else None)
    return Examination(Table(truth, expected), contexts), policy


KINDS = ("sampled", "greedy", "top10")


@PROPERTY
@given(examinations())
def test_nobody_beats_the_oracles(drawn: tuple[Examination, Says]) -> None:
    examination, policy = drawn
    own, oracle, score_oracle = (examination.evaluate(agent) for agent in (policy, Oracle(), ScoreOracle()))
    for kind in KINDS:
        assert own[f"regret_{kind}"] >= -1e-6
        assert own[f"value_{kind}"] <= oracle[f"value_{kind}"] + 1e-6
        assert own[f"score_value_{kind}"] <= score_oracle[f"score_value_{kind}"] + 1e-9
        assert oracle[f"score_value_{kind}"] <= score_oracle[f"score_value_{kind}"] + 1e-9
        assert oracle[f"regret_{kind}"] == pytest.approx(0.0, abs=1e-9)
        assert own[f"regret_{kind}"] == pytest.approx(oracle[f"value_{kind}"] - own[f"value_{kind}"], abs=1e-9)


@PROPERTY
@given(examinations())
def test_values_are_sums_over_unseen_titles(drawn: tuple[Examination, Says]) -> None:
    """Against loops; and titles drawn from the policy on an even grid are worth what the sum says."""
    examination, policy = drawn
    got = examination.evaluate(policy)
    truth, contexts = examination.satisfaction, examination.contexts
    sampled, listed = [], []
    for row, history in enumerate(contexts.observations.titles):
        unseen = [title for title in range(truth.shape[1]) if title not in history]
        weight = np.exp(policy.answer[row, unseen])
        sampled.append(weight @ truth[row, unseen])
        scores = getattr(policy, "scores", policy.log_probs)(contexts.observations)[row]
        best = sorted(unseen, key=lambda title: -scores[title])[:10]
        listed.append(truth[row, best].mean())
    assert got["value_sampled"] == pytest.approx(np.mean(sampled), abs=1e-9)
    assert got["value_top10"] == pytest.approx(np.mean(listed), abs=1e-9)
    np.testing.assert_allclose(got.top10_values, listed)
    titles = sample_titles(np.repeat(policy.answer[:1], 1_000, axis=0), (np.arange(1_000) + 0.5) / 1_000)
    assert truth[0, titles].mean() == pytest.approx(sampled[0], abs=4 * truth.shape[1] / 1_000)


def test_every_figure_is_described_and_every_description_given(world: Table, contexts: Contexts) -> None:
    got = evaluate(world, Says(log(POLICY)), contexts)
    without = {
        "kl_ref",
        "judge_return",
        "judge_return_sd",
        "score_return",
        "value_return",
        "overoptimisation",
        "misalignment",
    }
    assert set(got.metrics) == set(METRICS) - without
    reference = Fixed(np.zeros((2, 4)))
    full = evaluate(world, reference, contexts, judge=TableJudge(EXPECTED), reference=reference)
    assert set(full.metrics) == set(METRICS)
    assert full["kl_ref"] == pytest.approx(0.0)


def test_what_agents_share_is_worked_out_once(world: Table, contexts: Contexts) -> None:
    examination = Examination(world, contexts)
    for _ in range(3):
        examination.evaluate(Says(log(POLICY)))
    assert world.asked == 1


# -- answers that are no policy -----------------------------------------------------------------------------------

BAD = {
    "shape": (POLICY[:1], r"shape \(1, 4\).*\(2, 4\)"),
    "NaN": ([[0, math.nan, 0.5, 0.5], POLICY[1]], "NaN in row 0"),
    "seen": ([[0.25, 0.25, 0.25, 0.25], POLICY[1]], "already seen"),
    "sum": ([POLICY[0], [0.2, 0.3, 0, 0.4]], r"sum to 0\.9"),
    "nothing": ([POLICY[0], [0, 0, 0, 0]], r"sum to 0\.0"),
    "infinite": ([[0, math.inf, 0, 0], POLICY[1]], "sum to inf"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_answer_that_is_no_policy_is_refused(world: Table, contexts: Contexts, kind: str) -> None:
    answer, sentence = BAD[kind]
    with pytest.raises(PolicyError, match=f"^Says .*{sentence}"):
        evaluate(world, Says(log(answer)), contexts)
    with pytest.raises(PolicyError, match=f"^Says .*{sentence}"):
        evaluate(world, Fixed(np.zeros((2, 4))), contexts, reference=Says(log(answer)))


@pytest.mark.parametrize(("scores", "sentence"), [([[1, 2, 3, 4]], "shape"), ([[1, 2, 3, math.nan]] * 2, "NaN")])
def test_rankings_that_are_none_are_refused(world: Table, contexts: Contexts, scores: Any, sentence: str) -> None:
    with pytest.raises(PolicyError, match=f"^Says .*{sentence}"):
        evaluate(world, Says(log(POLICY), scores), contexts)


def test_rounding_is_forgiven_and_taken_out(world: Table, contexts: Contexts) -> None:
    got = evaluate(world, Says(log(POLICY) + 5e-4), contexts).metrics
    exact = evaluate(world, Says(log(POLICY)), contexts).metrics
    assert got["value_sampled"] == pytest.approx(exact["value_sampled"], abs=1e-12)


# -- who sees what ------------------------------------------------------------------------------------------------


class Spy:
    """A uniform policy that notes everything it is handed."""

    def __init__(self) -> None:
        self.handed: list[tuple[Any, ...]] = []

    def log_probs(self, *arguments: Any, **named: Any) -> FloatArray:
        self.handed.append((*arguments, *named.values()))
        observations = arguments[0]
        return masked_softmax(np.zeros((len(observations), observations.n_titles)), observations.titles)

    def true_scores(self, *arguments: Any) -> FloatArray:
        raise AssertionError("only referees are asked")


def test_a_policy_sees_observations_and_nothing_else() -> None:
    world = World(WorldConfig(n_titles=12, history_length=3))
    contexts, spy = world.contexts(5), Spy()
    judge = TableJudge(np.zeros((5, 12)))
    Examination(world, contexts, judge, reference=spy).evaluate(spy)
    assert len(spy.handed) > 4
    for arguments in [*spy.handed, *((shown,) for shown in judge.shown)]:
        (observations,) = arguments
        assert type(observations) is Observations
        held = {field.name: getattr(observations, field.name) for field in fields(observations)}
        assert set(held) == {"titles", "scores", "times", "length", "epoch", "n_titles", "catalogue"}
        assert observations.catalogue is None or len(observations.catalogue) == 12  # one entry a title, none a user
        for name, value in held.items():
            if name not in ("n_titles", "catalogue"):
                assert type(value) is np.ndarray
                assert value.base is None or type(value.base) is np.ndarray
                assert value.shape[0] == 5
                assert not np.isin(contexts.users, value).any()  # ids of users start at two billion


def test_a_referee_is_handed_the_truth_and_the_users(world: Table, contexts: Contexts) -> None:
    class Referee:
        referee = True

        def true_scores(self, truth: Any, users: Users) -> FloatArray:
            assert truth is world
            np.testing.assert_array_equal(users, contexts.users)
            return np.array([[9.0, 1, 3, 2], [1, 2, 9, 3]])

    got = evaluate(world, Referee(), contexts, judge=TableJudge(EXPECTED)).metrics
    assert got["value_sampled"] == got["value_greedy"] == pytest.approx((3 + 1) / 2)  # titles 2 and 3, all the weight
    assert got["entropy"] == 0.0


def test_anything_with_log_probs_can_be_scored() -> None:
    world = World(WorldConfig(n_titles=12, history_length=3))

    class Mine:
        def log_probs(self, observations: Observations) -> FloatArray:
            return masked_softmax(np.zeros((len(observations), 12)), observations.titles)

    got = world.evaluate(Mine(), n_users=20)
    contexts = world.contexts(20)
    unseen = ~contexts.observations.seen()
    expected = [s[u].mean() for s, u in zip(world.satisfaction(contexts.users), unseen, strict=True)]
    assert got["value_sampled"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert got["entropy"] == pytest.approx(math.log(9))
    assert got["value_top10"] == pytest.approx(got["value_sampled"])  # nine titles are left, and all are listed


class OneTitle:
    """Puts everything on one unseen title and rules out the rest: legal, and a tie of all other titles."""

    name = "OneTitle"

    def log_probs(self, observations: Observations) -> NDArray[Any]:
        answer = np.full((len(observations), observations.n_titles), -np.inf)
        answer[np.arange(len(observations)), (~observations.seen()).argmax(axis=1)] = 0.0
        return answer


def test_what_a_policy_rules_out_still_ranks_above_what_was_seen() -> None:
    world = World(WorldConfig(n_titles=40, history_length=30, reward_noise=0.0))
    contexts = world.contexts(50)
    ranked = ranking_scores(OneTitle(), contexts.observations, world, contexts.users)
    top = top_k(ranked, 10)
    assert not np.take_along_axis(contexts.observations.seen(), top, axis=1).any()
    figures = Examination(world, contexts)
    assert figures.evaluate(OneTitle())["regret_top10"] >= 0.0


# -- warm and cold ------------------------------------------------------------------------------------------------


def test_warm_and_cold_by_hand() -> None:
    # Four titles of release 0, 0, 1, 2; the first user lives in epoch 1, where title 2 is new and 3 is not out; the
    # second in epoch 2, where 3 is new. Both have seen title 0. The policy prefers 3, then 2, then 1.
    truth = [[1, 2, 3, 5], [4, 3, 2, 1]]
    contexts = contexts_of([[0], [0]], 4, next_titles=[2, 1])
    catalogue = Catalogue(np.zeros(4, dtype=np.int64), np.ones(4, dtype=np.float32), np.array([0, 0, 1, 2]))
    seen = replace(contexts.observations, epoch=np.array([1, 2]), catalogue=catalogue)
    policy = Says(log([[0, 0.3, 0.7, 0], [0, 0.1, 0.2, 0.7]]))
    figures = Examination(Table(truth, truth), replace(contexts, observations=seen)).evaluate(policy).metrics
    assert set(COLD_METRICS) <= set(figures)
    assert figures["cold_available"] == pytest.approx(2 / 5)  # {1, 2} and {1, 2, 3}
    assert figures["cold_top10"] == pytest.approx(2 / 4)  # lists of two: 2 and 1; 3 and 2
    assert figures["value_top10_warm"] == pytest.approx((2 + 2) / 2)  # best warm: 1 (worth 2), and 2 (worth 2)
    assert figures["value_top10_cold"] == pytest.approx((3 + 1) / 2)
    # the next title of the first user is cold and ranked first; that of the second warm and third: 1/log2(4)
    assert (figures["mrr_cold"], figures["mrr_warm"]) == pytest.approx((1.0, 1 / 3))
    assert (figures["ndcg10_cold"], figures["ndcg10_warm"]) == pytest.approx((1.0, 0.5))
    assert (figures["hr10_cold"], figures["hr10_warm"]) == (1.0, 1.0)


def test_a_policy_with_weight_on_what_is_not_out_is_refused() -> None:
    contexts = contexts_of([[0]], 3)
    catalogue = Catalogue(np.zeros(3, dtype=np.int64), np.ones(3, dtype=np.float32), np.array([0, 0, 1]))
    seen = replace(contexts.observations, catalogue=catalogue)
    with pytest.raises(PolicyError, match="puts weight on a title that is not out yet"):
        Examination(Table([[1, 2, 3]], [[1, 2, 3]]), replace(contexts, observations=seen)).evaluate(
            Says(log([[0, 0.5, 0.5]]))
        )


def test_where_all_titles_are_out_there_are_no_cold_figures() -> None:
    world = World(WorldConfig(n_titles=12, history_length=3))
    assert not set(COLD_METRICS) & set(world.evaluate(Fixed(np.zeros((5, 12))), 5).metrics)
