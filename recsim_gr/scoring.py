"""Scoring a policy against the truth: exact over actions, for given contexts (design §8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from recsim_gr import metrics
from recsim_gr.noise import Scores
from recsim_gr.observations import LOWEST_SCORE, Contexts, Observations
from recsim_gr.policy import Truth, log_probs_of, ranking_scores
from recsim_gr.randomness import uniforms

FloatArray = NDArray[np.float64]

TOP_K = 10
"""Length of the list behind the headline ``value_top10`` and the ranking metrics; where some context has fewer unseen
titles, all lists are cut to as many."""

ROLLOUT_STEPS, DISCOUNT = 3, 0.9
"""The judge's horizon and discount: the study's few discounted steps. The judge has learned from titles that users
chose, so where users may abandon a title (``accept``) it promises more than they take."""

ROLLOUT_GAP_HOURS = 0.7
"""Between recommended titles: they follow within a session."""


class WorldTruth(Truth, Protocol):
    """What scoring asks of a world beside the truth."""

    @property
    def uniforms_per_exposure(self) -> int: ...

    def satisfaction(self, users: NDArray[np.int64]) -> NDArray[np.float32]: ...

    def acceptance(self, users: NDArray[np.int64]) -> FloatArray: ...

    def logging_log_probs(
        self,
        users: NDArray[np.int64],
        histories: NDArray[np.int64],
        times: NDArray[Any] | None = None,
        now: NDArray[Any] | None = None,
    ) -> FloatArray: ...

    def sample_scores(self, users: NDArray[np.int64], titles: NDArray[np.int64], u: FloatArray) -> Scores: ...


class Judge(Protocol):
    """A reward model trained on other users."""

    def mean(self, observations: Observations) -> NDArray[np.float32]:
        """(n, I): the score it expects of every title."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What an agent is worth.

    Attributes:
        metrics: name to figure; `METRICS` says what each is.
        top10_values: (n,) the true value of each context's list, for paired comparisons.
    """

    metrics: dict[str, float]
    top10_values: FloatArray

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]


METRICS = {
    "value_sampled": "mean true satisfaction of a title drawn from the policy: Σ_a π(a|x)·s(u,a)",
    "value_greedy": "mean true satisfaction of the policy's first title",
    "value_top10": "mean true satisfaction of the policy's ten first titles: the headline",
    "value_top10_se": "standard error of value_top10 over contexts",
    "score_value_sampled": "as value_sampled, with E[score|u,a] in place of satisfaction",
    "score_value_greedy": "as value_greedy, with E[score|u,a]",
    "score_value_top10": "as value_top10, with E[score|u,a]",
    "regret_sampled": "what the best unseen title is worth, less value_sampled",
    "regret_greedy": "what the best unseen title is worth, less value_greedy",
    "regret_top10": "what the ten best unseen titles are worth, less value_top10",
    "nll": "mean −log π of the title that the user really chose next, in nats",
    "entropy": "of the policy, in nats, mean over contexts",
    "kl_ref": "KL(π ‖ π_ref) from the pretrained policy, in nats, mean over contexts",
    "effective_sample_size": "E_μ[w]²/E_μ[w²], w = π/μ: the share of a log that tells about the policy",
    "coverage": "share of the catalogue that stands in some top-ten list",
    "popularity_gini": "Gini coefficient of how often titles stand in top-ten lists",
    "ndcg10": "NDCG@10 of the next logged title, users of above-median mean score",
    "hr10": "hit rate @10, the same users",
    "mrr": "mean reciprocal rank, the same users",
    "ndcg10_true": "NDCG@10, users of above-median mean true satisfaction",
    "hr10_true": "hit rate @10, the same users",
    "mrr_true": "mean reciprocal rank, the same users",
    "ndcg10_own": "NDCG@10, all users, weighted by the next title's score (sample's lowest: 0, highest: 1)",
    "hr10_own": "hit rate @10, weighted likewise",
    "mrr_own": "mean reciprocal rank, weighted likewise",
    "judge_return": "judge's mean score over three discounted steps, its own scores appended",
    "judge_return_sd": "standard deviation of judge_return over users",
    "score_return": "expected score over three discounted steps of the true world; 1 once a title was abandoned",
    "value_return": "true satisfaction over the same three steps as score_return, likewise",
    "overoptimisation": "judge_return − score_return",
    "misalignment": "score_return − value_return",
}
"""What each figure of an `Evaluation` is."""

COLD_METRICS = {
    "cold_available": "share of the titles that can be chosen that are cold: came out in the context's own epoch",
    "cold_top10": "share of cold titles in the top-ten lists",
    "value_top10_warm": "mean true satisfaction of the policy's ten first warm titles",
    "value_top10_cold": "mean true satisfaction of the policy's ten first cold titles",
    "ndcg10_warm": "NDCG@10 among all titles, users whose next title is warm",
    "hr10_warm": "hit rate @10, the same users",
    "mrr_warm": "mean reciprocal rank, the same users",
    "ndcg10_cold": "NDCG@10 among all titles, users whose next title is cold",
    "hr10_cold": "hit rate @10, the same users",
    "mrr_cold": "mean reciprocal rank, the same users",
}
"""Further figures, given where titles come out over time."""


class Answer(NamedTuple):
    """A policy's answer on a batch: (n, I) log-probabilities and ranking scores."""

    log_probs: FloatArray
    scores: FloatArray


class Examination:
    """One set of contexts, with all that is the same for every agent worked out once.

    Args:
        world: whose truth counts.
        contexts: what the agents are asked.
        judge: a reward model of other users; without it no rollouts are made.
        reference: π_ref, for KL; without it no KL is given.
        seed: of the rollouts' common random numbers.
        rollout_contexts: how many of the contexts the rollouts use.
    """

    def __init__(
        self,
        world: WorldTruth,
        contexts: Contexts,
        judge: Judge | None = None,
        reference: Any = None,
        seed: int = 0,
        rollout_contexts: int = 1_000,
    ) -> None:
        self.world, self.contexts, self.judge, self.seed = world, contexts, judge, seed
        self.rollouts = min(rollout_contexts, len(contexts))
        unseen = int((~contexts.observations.unavailable()).sum(axis=1).min())
        self.listed, self.rollout_steps = min(TOP_K, unseen), min(ROLLOUT_STEPS, unseen)
        self.reference = None if reference is None else self._answer(reference).log_probs

    @cached_property
    def satisfaction(self) -> FloatArray:
        """(n, I): what recommending a title is truly worth."""
        return self.world.worth(self.contexts.users).astype(np.float64)

    @cached_property
    def expected_score(self) -> FloatArray:
        """(n, I)."""
        return self.world.expected_score(self.contexts.users)

    @cached_property
    def logging(self) -> FloatArray:
        """(n, I) log-propensities of the logging policy."""
        seen = self.contexts.observations
        return self.world.logging_log_probs(self.contexts.users, seen.titles, seen.times, self.contexts.next_times)

    @cached_property
    def cold(self) -> NDArray[np.bool_] | None:
        """(n, I): the titles that came out in the context's own epoch, which no user of an earlier one has seen; None
        where there are none."""
        seen = self.contexts.observations
        if seen.catalogue is None or not seen.catalogue.has_releases:
            return None
        release = seen.catalogue.release
        return (release == seen.epoch[:, None]) & (release > 0)

    def evaluate(self, policy: Any) -> Evaluation:
        """Scores one agent or referee.

        Raises:
            PolicyError: its answer is no policy.
        """
        answer = self._answer(policy)
        top = metrics.top_k(answer.scores, self.listed)
        per_context = np.take_along_axis(self.satisfaction, top, axis=1).mean(axis=1)
        figures = self._values(answer, top) | self._support(answer, top) | self._offline(answer)
        if self.cold is not None:
            figures |= self._warm_and_cold(answer, top, self.cold)
        if self.judge is not None:
            figures |= self._returns(policy, answer)
        return Evaluation(figures, per_context)

    def _answer(self, policy: Any) -> Answer:
        observations, users = self.contexts.observations, self.contexts.users
        log_probs = log_probs_of(policy, observations, self.world, users)
        return Answer(log_probs, ranking_scores(policy, observations, self.world, users, log_probs))

    def _values(self, answer: Answer, top: NDArray[np.int64]) -> dict[str, float]:
        probabilities = np.exp(answer.log_probs)
        unseen = np.where(self.contexts.observations.unavailable(), -np.inf, self.satisfaction)
        best = np.take_along_axis(unseen, metrics.top_k(unseen, self.listed), axis=1)
        figures: dict[str, float] = {}
        for name, truth in (("value", self.satisfaction), ("score_value", self.expected_score)):
            listed = np.take_along_axis(truth, top, axis=1)
            figures[f"{name}_sampled"] = float((probabilities * truth).sum(axis=1).mean())
            figures[f"{name}_greedy"] = float(listed[:, 0].mean())
            figures[f"{name}_top10"] = float(listed.mean())
            if name == "value":
                spread = listed.mean(axis=1).std(ddof=1) if len(listed) > 1 else float("nan")
                figures["value_top10_se"] = float(spread / np.sqrt(len(listed)))
        for kind, ceiling in (("sampled", best[:, 0]), ("greedy", best[:, 0]), ("top10", best)):
            figures[f"regret_{kind}"] = float(ceiling.mean()) - figures[f"value_{kind}"]
        return figures

    def _support(self, answer: Answer, top: NDArray[np.int64]) -> dict[str, float]:
        shown = np.bincount(top.ravel(), minlength=answer.scores.shape[1])
        next_titles = self.contexts.next_titles[:, None]
        figures = {
            "nll": float(-np.take_along_axis(answer.log_probs, next_titles, axis=1).mean()),
            "entropy": float(metrics.entropy(answer.log_probs).mean()),
            "effective_sample_size": metrics.effective_sample_share(answer.log_probs, self.logging),
            "coverage": float((shown > 0).mean()),
            "popularity_gini": metrics.gini(shown),
        }
        if self.reference is not None:
            figures["kl_ref"] = float(metrics.kl_divergence(answer.log_probs, self.reference).mean())
        return figures

    def _offline(self, answer: Answer) -> dict[str, float]:
        contexts = self.contexts
        ranks = metrics.rank_of(answer.scores, contexts.next_titles)
        seen_truth = self._seen_truth
        observed = contexts.observations.scores.sum(axis=1) / np.maximum(contexts.observations.length, 1)
        next_scores = contexts.next_scores.astype(np.float64)
        low = next_scores.min()
        groups = {
            "": _above_median(observed),
            "_true": _above_median(seen_truth),
            "_own": (next_scores - low) / max(float(np.ptp(next_scores)), 1e-12),
        }
        figures = {}
        for suffix, weight in groups.items():
            total = weight.sum()
            for name, values in (
                ("ndcg10", metrics.ndcg(ranks, TOP_K)),
                ("hr10", metrics.hit_rate(ranks, TOP_K)),
                ("mrr", metrics.reciprocal_rank(ranks)),
            ):
                figures[name + suffix] = float((weight * values).sum() / total) if total > 0 else float("nan")
        return figures

    def _warm_and_cold(self, answer: Answer, top: NDArray[np.int64], cold: NDArray[np.bool_]) -> dict[str, float]:
        """The headline and the offline metrics among warm and among cold titles alone."""
        barred = self.contexts.observations.unavailable()
        next_titles = self.contexts.next_titles[:, None]
        ranks = metrics.rank_of(answer.scores, next_titles[:, 0])
        next_cold = np.take_along_axis(cold, next_titles, axis=1)[:, 0]
        figures = {
            "cold_available": float((cold & ~barred).sum() / (~barred).sum()),
            "cold_top10": float(np.take_along_axis(cold, top, axis=1).mean()),
        }
        for name, group, users in (("warm", ~cold, ~next_cold), ("cold", cold, next_cold)):
            there = group & ~barred
            listed = min(TOP_K, int(there.sum(axis=1).min()))
            best = metrics.top_k(np.where(there, answer.scores, -np.inf), listed)
            value = np.take_along_axis(self.satisfaction, best, axis=1)
            figures[f"value_top10_{name}"] = float(value.mean()) if listed else float("nan")
            for metric, values in (
                ("ndcg10", metrics.ndcg(ranks, TOP_K)),
                ("hr10", metrics.hit_rate(ranks, TOP_K)),
                ("mrr", metrics.reciprocal_rank(ranks)),
            ):
                figures[f"{metric}_{name}"] = float(values[users].mean()) if users.any() else float("nan")
        return figures

    @cached_property
    def _seen_truth(self) -> FloatArray:
        """(n,) mean true satisfaction of the titles in each history: they were watched, accepted or not."""
        truth = self.world.satisfaction(self.contexts.users).astype(np.float64)
        return _history_mean(truth, self.contexts.observations)

    # -- rollouts -------------------------------------------------------------------------------------------------

    def _returns(self, policy: Any, first: Answer) -> dict[str, float]:
        judged, spread = self._judged_return(policy, first)
        score, value = self._true_return(policy, first)
        return {
            "judge_return": judged,
            "judge_return_sd": spread,
            "score_return": score,
            "value_return": value,
            "overoptimisation": judged - score,
            "misalignment": score - value,
        }

    @cached_property
    def _first_judgement(self) -> NDArray[np.float32]:
        assert self.judge is not None
        return self.judge.mean(self.contexts.observations[slice(0, self.rollouts)])

    @cached_property
    def _rollout_uniforms(self) -> FloatArray:
        """(n, steps, 1 + per event): the choice of each step, and the noise of its score; the same for all agents."""
        n = 1 + self.world.uniforms_per_exposure
        users = self.contexts.users[: self.rollouts]
        return uniforms(self.seed, "rollouts", users, ROLLOUT_STEPS * n).reshape(-1, ROLLOUT_STEPS, n)

    @cached_property
    def _acceptance(self) -> FloatArray | None:
        """(rollouts, I): P(a recommended title is watched); None where all are."""
        acceptance = self.world.acceptance(self.contexts.users[: self.rollouts])
        return None if (acceptance == 1.0).all() else acceptance

    def _judged_return(self, policy: Any, first: Answer) -> tuple[float, float]:
        """Its mean and its standard deviation over users."""
        assert self.judge is not None
        observations = self.contexts.observations[slice(0, self.rollouts)]
        log_probs = first.log_probs[: self.rollouts]
        rewards = []
        for step in range(self.rollout_steps):
            titles = sample_titles(log_probs, self._rollout_uniforms[:, step, 0])
            judgement = self._first_judgement if step == 0 else self.judge.mean(observations)
            scores = np.take_along_axis(judgement, titles[:, None], axis=1)[:, 0]
            rewards.append(scores)
            if step + 1 < self.rollout_steps:
                observations = observations.append(titles, scores, ROLLOUT_GAP_HOURS)
                log_probs = self._rollout_log_probs(policy, observations)
        by_user = discounted_mean(rewards)
        spread = float(by_user.std(ddof=1)) if len(by_user) > 1 else float("nan")
        return float(discounted_mean([step.mean() for step in rewards])), spread

    def _true_return(self, policy: Any, first: Answer) -> tuple[float, float]:
        observations = self.contexts.observations[slice(0, self.rollouts)]
        users = self.contexts.users[: self.rollouts]
        log_probs = first.log_probs[: self.rollouts]
        scores, values = [], []
        there = np.ones(len(users))  # the probability that the session goes on: it ends with an abandoned title
        for step in range(self.rollout_steps):
            u = self._rollout_uniforms[:, step]
            titles = sample_titles(log_probs, u[:, 0])
            rows = (np.arange(len(users)), titles)
            gained = [truth[: self.rollouts][rows] for truth in (self.expected_score, self.satisfaction)]
            if self._acceptance is not None:
                gained = [LOWEST_SCORE + there * (gain - LOWEST_SCORE) for gain in gained]
                there = there * self._acceptance[rows]
                u = np.column_stack([u[:, :-1], np.zeros(len(u))])  # who goes on has watched
            scores.append(float(gained[0].mean()))
            values.append(float(gained[1].mean()))
            if step + 1 < self.rollout_steps:
                got = self.world.sample_scores(users, titles, u[:, 1:]).score.astype(np.float32)
                observations = observations.append(titles, got, ROLLOUT_GAP_HOURS)
                log_probs = self._rollout_log_probs(policy, observations)
        return float(discounted_mean(scores)), float(discounted_mean(values))

    def _rollout_log_probs(self, policy: Any, observations: Observations) -> FloatArray:
        return log_probs_of(policy, observations, self.world, self.contexts.users[: self.rollouts])


def evaluate(
    world: WorldTruth, policy: Any, contexts: Contexts, judge: Judge | None = None, reference: Any = None
) -> Evaluation:
    """Scores one agent on given contexts, see `METRICS`. To score several, share one `Examination`.

    Raises:
        PolicyError: its answer is no policy.
    """
    return Examination(world, contexts, judge, reference).evaluate(policy)


def sample_titles(log_probs: FloatArray, u: FloatArray) -> NDArray[np.int64]:
    """(n,) titles by inverse CDF: (n, I) log-probabilities, (n,) uniforms in (0, 1). Titles of weight 0 never come."""
    cumulative = np.cumsum(np.exp(log_probs), axis=1)
    reached = cumulative > (u * cumulative[:, -1])[:, None]
    return reached.argmax(axis=1)


def discounted_mean(rewards: Sequence[Any]) -> Any:
    """Σ γ^h r_h / Σ γ^h of numbers or of arrays, so that returns stay on the scale of a score."""
    weights = DISCOUNT ** np.arange(len(rewards))
    return weights @ np.asarray(rewards, dtype=np.float64) / weights.sum()


def _above_median(values: FloatArray) -> FloatArray:
    return (values > np.median(values)).astype(np.float64)


def _history_mean(satisfaction: FloatArray, observations: Observations) -> FloatArray:
    """(n,) mean true satisfaction of the titles in each history."""
    seen = observations.seen()
    return np.where(seen, satisfaction, 0.0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
