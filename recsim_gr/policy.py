"""What an agent is, seen from the outside; and how its answers are checked."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from recsim_gr.errors import PolicyError
from recsim_gr.observations import Observations

FloatArray = NDArray[np.float64]

TOLERANCE = 1e-3
"""How far a row of probabilities may sum from 1: float32 log-softmax over 100,000 titles stays within."""


@runtime_checkable
class Policy(Protocol):
    """Anything that gives log-probabilities of all titles for a batch of observations.

    An agent may also have ``scores(observations) -> (n, I)`` for rankings; `ranking_scores` falls back on
    ``log_probs``.
    """

    def log_probs(self, observations: Observations) -> NDArray[Any]:
        """(n, I) log π(a | x), -inf for titles that are seen or not out yet."""
        ...


class Truth(Protocol):
    """What a referee is handed: the part of a world that no agent may see."""

    def worth(self, users: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, I): the satisfaction that recommending a title brings."""
        ...

    def expected_score(self, users: NDArray[np.int64]) -> FloatArray:
        """(n, I): the score that recommending it brings, on average."""
        ...


class Referee(Protocol):
    """A policy that knows the users: a ceiling, never a competitor. Marked by ``referee = True``."""

    referee: bool

    def true_scores(self, truth: Truth, users: NDArray[np.int64]) -> NDArray[Any]:
        """(n, I): what it ranks by; it plays the best title that can be chosen."""
        ...


def is_referee(policy: object) -> bool:
    """Whether a policy is marked as one that knows the truth."""
    return bool(getattr(policy, "referee", False))


def log_probs_of(policy: Any, observations: Observations, truth: Truth, users: NDArray[np.int64]) -> FloatArray:
    """(n, I) float64 log π(a | x) of an agent or a referee, checked and normalised.

    Raises:
        PolicyError: wrong shape, NaN, weight on a title that is seen or not out yet, or rows that do not sum to 1.
    """
    if is_referee(policy):
        return _all_on_the_best(ranking_scores(policy, observations, truth, users))
    return agent_log_probs(policy, observations)


def agent_log_probs(policy: Any, observations: Observations) -> FloatArray:
    """(n, I) float64 log π(a | x) of an agent, checked and normalised.

    Raises:
        PolicyError: a referee, which needs the truth; or wrong shape, NaN, weight on a title that is seen or not out
            yet, or rows that do not sum to 1.
    """
    name = getattr(policy, "name", type(policy).__name__)
    if is_referee(policy):
        raise PolicyError(f"{name} is a referee and answers only where the truth is known; ask the world, not a log")
    barred = observations.unavailable()
    log_probs = _checked(policy.log_probs(observations), barred, name)
    if not np.isneginf(log_probs[barred]).all():
        what = "already seen" if not np.isneginf(log_probs[observations.seen()]).all() else "that is not out yet"
        raise PolicyError(f"{name} puts weight on a title {what}; its log-probability must be -inf")
    total = np.exp(log_probs).sum(axis=1)
    if np.abs(total - 1.0).max() > TOLERANCE:
        worst = total[np.argmax(np.abs(total - 1.0))]
        raise PolicyError(f"{name} has probabilities that sum to {worst:.4f} in some context; they must sum to 1")
    return log_probs - np.log(total)[:, None]


def ranking_scores(
    policy: Any,
    observations: Observations,
    truth: Truth,
    users: NDArray[np.int64],
    log_probs: FloatArray | None = None,
) -> FloatArray:
    """(n, I) float64: what a policy ranks by, -inf for titles that are seen or not out yet.

    ``log_probs`` of the same observations, where they are known already, save a policy that ranks by them
    (``ranks_by_log_probs``) from answering twice.

    Raises:
        PolicyError: wrong shape or NaN.
    """
    name = getattr(policy, "name", type(policy).__name__)
    barred = observations.unavailable()
    if is_referee(policy):
        raw = policy.true_scores(truth, users)
    elif log_probs is not None and getattr(policy, "ranks_by_log_probs", not hasattr(policy, "scores")):
        raw = log_probs
    else:
        raw = getattr(policy, "scores", policy.log_probs)(observations)
    # a title that the policy itself rules out still ranks above those already seen, which cannot be recommended
    scores = np.maximum(_checked(raw, barred, name), np.finfo(np.float64).min)
    scores[barred] = -np.inf
    return scores


def _checked(values: NDArray[Any], barred: NDArray[np.bool_], name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != barred.shape:
        raise PolicyError(f"{name} answered with shape {array.shape}; (contexts, titles) is {barred.shape}")
    if np.isnan(array).any():
        raise PolicyError(f"{name} answered with NaN in row {int(np.isnan(array).any(axis=1).argmax())}")
    return array


def _all_on_the_best(scores: FloatArray) -> FloatArray:
    log_probs = np.full(scores.shape, -np.inf)
    np.put_along_axis(log_probs, scores.argmax(axis=1)[:, None], 0.0, axis=1)
    return log_probs
