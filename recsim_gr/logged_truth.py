"""What a policy is truly worth on the contexts of a log: what off-policy estimators are measured against.

The contexts of a log are the histories before its events. In each, the logging policy μ, the policy π and the law of
the score are known for every title, so values and variances are sums over the catalogue and not simulations. Logged
titles were watched, so the score here is that of a watched title also where the dial ``accept`` lets users abandon a
recommendation: a log of choices cannot know of that.

Given the user and all that came before event t, the estimator's part d_t = w_t·(r_t − c(a_t)) + Σ_a π·c − V(x_t) has
mean 0 whatever the baseline c (0 for ``ips``, a constant for ``snips``, q̂ for ``dr``): a martingale difference. So the
errors of different events are uncorrelated, also those of one user, and the variance of their sum is the sum of their
conditional variances ::

    Var(d_t | x_t) = Σ_a π(a|x)²/μ(a|x)·E[(r − c(a))² | u, a] − (Σ_a π(a|x)·(E[r|u,a] − c(a)))²

All of it takes E[r | u, a, the past] for E[r | u, a]: true of every noise without memory, and not of ``drift``, where a
user's mood lasts from event to event.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recsim_gr import configs
from recsim_gr.errors import ConfigError, EstimationError, UnknownNameError
from recsim_gr.estimators import RewardModel, event_chunks, prefixes
from recsim_gr.log import InteractionLog
from recsim_gr.noise import Exposure, RewardNoise
from recsim_gr.policy import Truth, log_probs_of

FloatArray = NDArray[np.float64]


class LoggingTruth(Truth, Protocol):
    """What is asked of a world beside the truth: its logging policy, and the first two moments of logged scores."""

    @property
    def n_titles(self) -> int: ...

    @property
    def noise(self) -> RewardNoise: ...

    def exposure(self, users: NDArray[np.int64]) -> Exposure: ...

    def logging_log_probs(
        self,
        users: NDArray[np.int64],
        histories: NDArray[np.int64],
        times: NDArray[Any] | None = None,
        now: NDArray[Any] | None = None,
    ) -> FloatArray: ...


@dataclass(frozen=True, eq=False)
class LogTruth:
    """Exact figures of a policy on the contexts of a log, (E,) each, an event each.

    Attributes:
        score_value: V(x) = Σ_a π(a|x)·E[score|u,a]; its mean is what the estimators estimate.
        value: Σ_a π(a|x)·s(u,a), the same of the true satisfaction.
        weight_square: E_μ[w² | x] = Σ_a π(a|x)²/μ(a|x).
        weighted_score, weighted_square: Σ_a π²/μ·E[score|u,a] and Σ_a π²/μ·E[score²|u,a].
        dr_variance: the conditional variance of ``dr``'s event; None without a reward model.
    """

    score_value: FloatArray
    value: FloatArray
    weight_square: FloatArray
    weighted_score: FloatArray
    weighted_square: FloatArray
    dr_variance: FloatArray | None = None

    def variance(self, estimator: str) -> FloatArray:
        """(E,) the conditional variance of each event's part, see the head of the module. For ``snips`` it is that
        of the linearisation around the exact value, to first order in 1/E.

        Raises:
            UnknownNameError: an estimator whose variance is not known here.
            ConfigError: ``dr`` without a reward model.
        """
        v = self.score_value
        if estimator == "ips":
            return self.weighted_square - v**2
        if estimator == "snips":
            c = float(v.mean())
            return self.weighted_square - 2.0 * c * self.weighted_score + c**2 * self.weight_square - (v - c) ** 2
        if estimator == "dr":
            if self.dr_variance is None:
                raise ConfigError("the variance of dr needs the reward model; give log_truth(..., reward_model=)")
            return self.dr_variance
        raise UnknownNameError(f"no exact variance of {estimator!r}; there are ips, snips, dr")

    def standard_error(self, estimator: str) -> float:
        """The exact standard error about the value on the log's own contexts: the root of the summed variances, over
        E.

        Raises:
            UnknownNameError, ConfigError: as `variance`.
        """
        return float(np.sqrt(self.variance(estimator).sum())) / len(self.score_value)


def log_truth(
    world: LoggingTruth, policy: Any, log: InteractionLog, reward_model: RewardModel | None = None
) -> LogTruth:
    """Exact value, weights and variances of a policy (or a referee) on every context of a log.

    Args:
        world: the world that made the log.
        policy: what is scored.
        log: with or without propensities; the world's own are used.
        reward_model: q̂ of ``dr``; None leaves its variance out.

    Raises:
        PolicyError: the policy's answer is no policy.
        EstimationError: the log is another world's.
    """
    _refuse_foreign(world, log)
    out = np.empty((6, len(log)))
    for events in event_chunks(log):
        observations, users = prefixes(log, events), log.user[events]
        log_pi = log_probs_of(policy, observations, world, users)
        log_mu = world.logging_log_probs(users, observations.titles, observations.times, log.hours[events])
        pi, ratio = np.exp(log_pi), np.exp(2.0 * log_pi - np.where(np.isneginf(log_pi), 0.0, log_mu))  # ratio: π²/μ
        known, back = np.unique(users, return_inverse=True)
        facts = world.exposure(known)
        mean, square = world.noise.expected(facts)[back], world.noise.second_moment(facts)[back]
        satisfaction = facts.satisfaction[back]
        out[:5, events] = [
            (pi * mean).sum(axis=1),
            (pi * satisfaction).sum(axis=1),
            ratio.sum(axis=1),
            (ratio * mean).sum(axis=1),
            (ratio * square).sum(axis=1),
        ]
        if reward_model is not None:
            q = np.asarray(reward_model.mean(observations), dtype=np.float64)
            second = (ratio * (square - 2.0 * q * mean + q**2)).sum(axis=1)
            out[5, events] = second - (pi * (mean - q)).sum(axis=1) ** 2
    return LogTruth(out[0], out[1], out[2], out[3], out[4], None if reward_model is None else out[5])


def _refuse_foreign(world: LoggingTruth, log: InteractionLog) -> None:
    """Where a log says what it was made with, it must be this world's config."""
    made, own = (log.provenance or {}).get("config"), getattr(world, "config", None)
    if not isinstance(made, dict) or own is None:
        made = {}
    there = made | {"n_titles": log.n_titles}
    here = {**(configs.to_dict(own) if made else {}), "n_titles": world.n_titles}
    differing = sorted(name for name in there if there[name] != here.get(name, there[name]))
    if differing:
        name = differing[0]
        found = f"{name}: {there[name]!r} there, {here[name]!r} here"
        raise EstimationError(f"the log is another world's ({found}); give the world that made it")
