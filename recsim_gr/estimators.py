"""Off-policy estimators: what a policy would have scored, from a log of another policy with its propensities.

Notation (design §7): x context, a logged title, r its score, π the policy asked about, μ the logging policy,
w = π(a|x)/μ(a|x) the weight, q̂(x, ·) a reward model. Every estimator is a pure function to *per-event values*, (E,),
whose mean is the estimate; mean and interval are made once, in `interval`.

| name | per-event value | source |
|---|---|---|
| ``ips`` | w·r | Horvitz & Thompson 1952 |
| ``snips`` | V̂ + w·(r − V̂)/w̄, with V̂ = Σwr/Σw | Swaminathan & Joachims 2015 |
| ``dm`` | Σ_a' π(a'|x)·q̂(x,a') | the direct method |
| ``dr`` | Σ_a' π(a'|x)·q̂(x,a') + w·(r − q̂(x,a)) | Dudík, Langford & Li 2011 |
| ``sndr`` | dm + R̂ + w·(r − q̂(x,a) − R̂)/w̄, with R̂ = Σw(r − q̂)/Σw | Thomas & Brunskill 2016 (weighted DR) |

The self-normalised ones are ratios of two means. What stands above is each event's part in their linearisation, so that
its spread is the delta method's variance.

**Two targets.** Given the user and the titles before, w·r has the mean V(x) = Σ_a π(a|x)·E[score|u,a], whatever x came
of the logging policy's own luck; so all of them (dm aside) estimate the mean of V over the log's *own contexts*, which
a world knows exactly (`recsim_gr.log_truth`). The users are a sample too, and the same figure estimates what other
users would give. An interval is about the one or the other, and says which.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from recsim_gr.errors import ConfigError, EstimationError, UnknownNameError
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Observations
from recsim_gr.policy import agent_log_probs

FloatArray = NDArray[np.float64]

CHUNK_ENTRIES = 1 << 21
"""Contexts times titles handled at a time: 16 MB a temporary in float64."""

TARGETS = ("users", "contexts")


class RewardModel(Protocol):
    """What ``dm`` and ``dr`` ask of a reward model; `recsim_gr.RewardEnsemble` is one."""

    def mean(self, observations: Observations) -> NDArray[Any]:
        """(n, I): q̂(x, ·)."""
        ...


class Terms(NamedTuple):
    """What the estimators need of each logged event, (E,) each.

    Attributes:
        users: int64, whose event it is; the events of a user need not stand together.
        scores: r.
        weights: w; None where the log carries no propensities.
        logged_prediction: q̂(x, a) of the logged title; None without a reward model.
        policy_prediction: Σ_a' π(a'|x)·q̂(x, a'); None without a reward model.
    """

    users: NDArray[np.int64]
    scores: FloatArray
    weights: FloatArray | None = None
    logged_prediction: FloatArray | None = None
    policy_prediction: FloatArray | None = None


class Interval(NamedTuple):
    """A mean with its uncertainty.

    Attributes:
        value: the mean of the per-event values.
        standard_error: of ``value`` about its target, clustered by user.
        low, high: the ends of the Student-t interval.
    """

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Estimate:
    """What an estimator says of a policy.

    Attributes:
        estimator: its name.
        about: what the interval is about, ``users`` or ``contexts``.
        level: of the interval.
        value, standard_error, low, high: as in `Interval`; points of score.
        effective_sample_size: (Σw)²/Σw², the number of events that tell about the policy; NaN without weights.
        values: (E,) per-event values; their mean is ``value``.
    """

    estimator: str
    about: str
    level: float
    value: float
    standard_error: float
    low: float
    high: float
    effective_sample_size: float
    values: FloatArray


# -- pure functions: arrays of events to per-event values -----------------------------------------------------------


def importance_weights(log_probs: ArrayLike, propensities: ArrayLike) -> FloatArray:
    """(E,) w = π(a|x)/μ(a|x).

    Args:
        log_probs: (E,) log π of the logged title; -inf where the policy would not play it.
        propensities: (E,) μ of the logged title, in (0, 1].

    Raises:
        EstimationError: a propensity outside (0, 1], a log-probability that is NaN or above 0, unequal shapes, or a
            weight too large for a float64.
    """
    log_pi, mu = np.asarray(log_probs, dtype=np.float64), np.asarray(propensities, dtype=np.float64)
    _same_shape(log_probs=log_pi, propensities=mu)
    _refuse("propensities", mu, ~((mu > 0) & (mu <= 1)), "in (0, 1]")
    _refuse("log_probs", log_pi, ~(log_pi <= 1e-6), "at most 0")  # rounding may leave log 1 just above 0
    with np.errstate(over="ignore"):
        return _weights(np.exp(log_pi - np.log(mu)))


def clipped(weights: ArrayLike, clip: float) -> FloatArray:
    """(E,) min(w, clip): less variance for a bias towards 0 (Ionides 2008, truncated importance sampling).

    Raises:
        EstimationError: weights that are negative or not finite, or ``clip`` not positive.
    """
    if not clip > 0:
        raise EstimationError(f"clip must be positive, got {clip!r}")
    return np.minimum(_weights(weights), clip)


def ips(weights: ArrayLike, scores: ArrayLike) -> FloatArray:
    """(E,) w·r.

    Raises:
        EstimationError: weights that are negative or not finite, scores that are not finite, unequal shapes.
    """
    w, r = _weights(weights), _finite("scores", scores)
    _same_shape(weights=w, scores=r)
    return w * r


def snips(weights: ArrayLike, scores: ArrayLike) -> FloatArray:
    """(E,) V̂ + w·(r − V̂)/w̄ with V̂ = Σwr/Σw: their mean is V̂.

    Raises:
        EstimationError: as `ips`, or no weight on any event.
    """
    w, r = _weights(weights), _finite("scores", scores)
    _same_shape(weights=w, scores=r)
    return _self_normalised(w, r)


def dm(policy_prediction: ArrayLike) -> FloatArray:
    """(E,) Σ_a' π(a'|x)·q̂(x,a'), which asks nothing of the log but its contexts.

    Raises:
        EstimationError: predictions that are not finite.
    """
    return _finite("policy_prediction", policy_prediction).copy()


def dr(
    weights: ArrayLike,
    scores: ArrayLike,
    logged_prediction: ArrayLike,
    policy_prediction: ArrayLike,
) -> FloatArray:
    """(E,) Σ_a' π(a'|x)·q̂(x,a') + w·(r − q̂(x,a)).

    Unbiased where q̂ was fitted on other users (or not at all): a q̂ fitted on these very scores is not.

    Raises:
        EstimationError: as `ips`, or predictions that are not finite.
    """
    w, residual, expected = _residuals(weights, scores, logged_prediction, policy_prediction)
    return expected + w * residual


def sndr(
    weights: ArrayLike,
    scores: ArrayLike,
    logged_prediction: ArrayLike,
    policy_prediction: ArrayLike,
) -> FloatArray:
    """(E,) as `dr`, with the mean correction divided by the mean weight.

    Raises:
        EstimationError: as `dr`, or no weight on any event.
    """
    w, residual, expected = _residuals(weights, scores, logged_prediction, policy_prediction)
    return expected + _self_normalised(w, residual)


@dataclass(frozen=True)
class Estimator:
    """One way to estimate.

    Attributes:
        per_event: `Terms` to per-event values.
        needs_propensities, needs_model: which terms it reads.
    """

    per_event: Callable[[Any], FloatArray]
    needs_propensities: bool
    needs_model: bool


ESTIMATORS: dict[str, Estimator] = {
    "ips": Estimator(lambda t: ips(t.weights, t.scores), True, False),
    "snips": Estimator(lambda t: snips(t.weights, t.scores), True, False),
    "dm": Estimator(lambda t: dm(t.policy_prediction), False, True),
    "dr": Estimator(lambda t: dr(t.weights, t.scores, t.logged_prediction, t.policy_prediction), True, True),
    "sndr": Estimator(lambda t: sndr(t.weights, t.scores, t.logged_prediction, t.policy_prediction), True, True),
}
"""Name to estimator."""


# -- mean and interval, once ----------------------------------------------------------------------------------------


def interval(
    values: ArrayLike,
    users: NDArray[np.int64],
    *,
    about: str = "users",
    centres: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval:
    """The mean of per-event values and its Student-t interval over users.

    * ``about="users"``: the log's users stand for others. The standard error is clustered by user: residuals from the
      mean are summed within each user, so any dependence between the events of one is allowed. It covers the value
      on the log's own contexts as well, more often than ``level``, since the users' differences are in it.
    * ``about="contexts"``: the users are held, and what varies is which titles they were shown and what they scored.
      - With ``centres``, what each event's value is expected to be given its context, residuals are taken from those
        and clustered by user: exact with V(x) from a world (`recsim_gr.log_truth`). A reward model's predictions are no
        such centres: they read the scores before the event, whose luck is in the residuals too, and the interval
        comes out too narrow.
      - Without, users are strata: the spread of the values within each user. That takes V(x) for constant along a
        history and the errors of a user's events for uncorrelated, which they are (martingale differences) under
        every noise without memory. Where noise lasts from event to event, as ``drift``, give centres or say
        ``users``.

    Args:
        values: (E,) as an estimator gives them.
        users: (E,) whose event each is.
        about: ``users`` or ``contexts``.
        centres: (E,), with ``contexts`` only.
        level: of the interval, in (0, 1).

    Raises:
        EstimationError: unequal shapes, values that are not finite, or fewer than two users.
        ConfigError: a target that does not exist, centres without their target, or a level outside (0, 1).
    """
    _check_target(about, centres, level)
    y = _finite("values", values)
    _same_shape(values=y, users=np.asarray(users))
    _, row, counts = np.unique(users, return_inverse=True, return_counts=True)
    n_users, n = len(counts), len(y)
    if n_users < 2:
        raise EstimationError(f"an interval needs events of at least two users, got {n_users}")
    if about == "contexts" and centres is None:
        square = _within_user_squares(y, row, counts)
    else:
        residual = y if centres is None else y - _finite("centres", centres, y.shape)
        sums = np.bincount(row, weights=residual - residual.mean())
        square = float(sums @ sums) * n_users / (n_users - 1)
    value, error = float(y.mean()), float(np.sqrt(square)) / n
    reach = float(stdtrit(n_users - 1, 0.5 + 0.5 * level)) * error
    return Interval(value, error, value - reach, value + reach)


def estimate_from(
    terms: Terms,
    estimator: str = "ips",
    *,
    clip: float | None = None,
    about: str = "users",
    centres: ArrayLike | None = None,
    level: float = 0.95,
) -> Estimate:
    """As `estimate`, from terms that are known already: several estimators share them.

    Raises:
        UnknownNameError, EstimationError, ConfigError: as `estimate` and `interval`.
    """
    method = _estimator(estimator)
    if method.needs_model and terms.policy_prediction is None:
        raise ConfigError(f"{estimator} needs a reward model; give reward_model=, or use ips or snips")
    if method.needs_propensities and terms.weights is None:
        raise EstimationError(f"{estimator} needs weights, and these terms have none; make them from propensities")
    if clip is not None and terms.weights is not None:
        terms = terms._replace(weights=clipped(terms.weights, clip))
    values = method.per_event(terms)
    found = interval(values, terms.users, about=about, centres=centres, level=level)
    size = float("nan") if terms.weights is None else effective_sample_size(terms.weights)
    return Estimate(estimator, about, level, *found, effective_sample_size=size, values=values)


def effective_sample_size(weights: ArrayLike) -> float:
    """(Σw)²/Σw² (Kish 1965); 0 where no event has weight.

    Raises:
        EstimationError: weights that are negative or not finite.
    """
    w = _weights(weights)
    square = float(w @ w)
    return float(w.sum()) ** 2 / square if square > 0 else 0.0


# -- from a policy and a log ----------------------------------------------------------------------------------------


def estimate(
    policy: Any,
    log: InteractionLog,
    estimator: str = "ips",
    *,
    reward_model: RewardModel | None = None,
    clip: float | None = None,
    about: str = "users",
    level: float = 0.95,
) -> Estimate:
    """What a policy would score on the contexts of a log, by its propensities.

    Logged titles were chosen, and so watched: where a recommendation may be abandoned (``accept``), this is the score
    of titles that are watched, above what recommending them would score.

    The log must be one that neither the policy nor the reward model was trained on: a policy that has seen the scores
    has picked their luck.

    Args:
        policy: anything with ``log_probs(observations)``.
        log: with propensities (``dm`` does without).
        estimator: a name in `ESTIMATORS`.
        reward_model: q̂, for ``dm``, ``dr`` and ``sndr``.
        clip: cuts the weights, see `clipped`; None leaves them.
        about, level: what the interval is about and its level, see `interval`.

    Raises:
        UnknownNameError: no such estimator.
        MissingPropensitiesError: the log was made without propensities.
        PolicyError: the policy's answer is no policy.
        EstimationError: an empty log, or predictions or weights that are not finite.
        ConfigError: a reward model that is missing, or an option that makes no sense.
    """
    method = _estimator(estimator)
    _check_target(about, None, level)
    if method.needs_model and reward_model is None:
        raise ConfigError(f"{estimator} needs a reward model; give reward_model=, or use ips or snips")
    if method.needs_propensities:
        log.require_propensities()
    terms = logged_terms(policy, log, reward_model if method.needs_model else None)
    return estimate_from(terms, estimator, clip=clip, about=about, level=level)


def logged_terms(policy: Any, log: InteractionLog, reward_model: RewardModel | None = None) -> Terms:
    """What all estimators need, asking the policy and the reward model once for every prefix of every history.

    Memory is bounded by `CHUNK_ENTRIES` contexts times titles, whatever the length of the log.

    Args:
        policy: anything with ``log_probs(observations)``.
        log: with or without propensities.
        reward_model: q̂; None leaves the predictions out.

    Raises:
        PolicyError: the policy's answer is no policy.
        EstimationError: an empty log, or predictions that are not finite.
    """
    if len(log) == 0:
        raise EstimationError("the log is empty; generate_log(n_users=...) makes one with events")
    chosen = np.empty(len(log))
    logged, expected = np.empty(len(log)), np.empty(len(log))
    for events in event_chunks(log):
        observations = prefixes(log, events)
        log_probs = agent_log_probs(policy, observations)
        titles = log.title[events][:, None]
        chosen[events] = np.take_along_axis(log_probs, titles, axis=1)[:, 0]
        if reward_model is not None:
            predicted = _predictions(reward_model, observations)
            logged[events] = np.take_along_axis(predicted, titles, axis=1)[:, 0]
            expected[events] = np.einsum("ni,ni->n", np.exp(log_probs), predicted)
    weights = None if log.propensities is None else importance_weights(chosen, log.propensities)
    scores = log.score.astype(np.float64)
    if reward_model is None:
        return Terms(log.user, scores, weights)
    return Terms(log.user, scores, weights, logged, expected)


def event_chunks(log: InteractionLog) -> Iterator[slice]:
    """Slices of events that cover a log, few enough at a time that contexts × titles stays bounded."""
    size = max(1, CHUNK_ENTRIES // log.n_titles)
    for start in range(0, len(log), size):
        yield slice(start, min(start + size, len(log)))


def prefixes(log: InteractionLog, events: slice) -> Observations:
    """The contexts of logged events: of each, the history before it.

    Args:
        log: the log.
        events: which events, as a slice with both ends.

    Returns:
        Observations as wide as the log's longest context, at least 1.
    """
    length = log.step[events]
    width = max(1, int(log.step.max(initial=0)))
    past = np.arange(width)
    real = past < length[:, None]
    row = np.where(real, np.arange(events.start, events.stop)[:, None] - length[:, None] + past, 0)
    return Observations(
        titles=np.where(real, log.title[row], log.n_titles),
        scores=np.where(real, log.score[row], np.float32(0.0)),
        times=np.where(real, log.hours[row], np.float32(0.0)),
        length=length,
        epoch=log.epoch[events],
        n_titles=log.n_titles,
        catalogue=log.catalogue,
    )


# -- inside -----------------------------------------------------------------------------------------------------------


def _estimator(name: str) -> Estimator:
    if name not in ESTIMATORS:
        raise UnknownNameError(f"no estimator {name!r}; there are {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def _self_normalised(w: FloatArray, r: FloatArray) -> FloatArray:
    total = float(w.sum())
    if total <= 0:
        raise EstimationError("the policy gives no logged title any weight; nothing in this log tells about it")
    ratio = float(w @ r) / total
    return ratio + w * (r - ratio) / (total / len(w))


def _residuals(
    weights: ArrayLike, scores: ArrayLike, logged: ArrayLike, expected: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    w, r = _weights(weights), _finite("scores", scores)
    q, v = _finite("logged_prediction", logged), _finite("policy_prediction", expected)
    _same_shape(weights=w, scores=r, logged_prediction=q, policy_prediction=v)
    return w, r - q, v


def _within_user_squares(y: FloatArray, row: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Σ_u T_u·s²_u, the estimated variance of the sum of all values given the users.

    Of a user with one event no spread is known: its distance from the mean of all stands in, which is never small.
    """
    own_mean = np.bincount(row, weights=y) / counts
    alone = (counts == 1)[row]
    residual = np.where(alone, y - y.mean(), y - own_mean[row])
    factor = np.where(counts > 1, counts / np.maximum(counts - 1, 1), 1.0)[row]
    return float((factor * residual**2).sum())


def _predictions(model: RewardModel, observations: Observations) -> FloatArray:
    shape = (len(observations), observations.n_titles)
    return _finite("predictions of the reward model", model.mean(observations), shape)


def _check_target(about: str, centres: object, level: float) -> None:
    if about not in TARGETS:
        raise ConfigError(f"no target {about!r} of an interval; there are {', '.join(TARGETS)}")
    if centres is not None and about != "contexts":
        raise ConfigError('centres belong to an interval about="contexts"; leave them out, or say so')
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level must be between 0 and 1, got {level!r}")


def _weights(weights: ArrayLike) -> FloatArray:
    w = _finite("weights", weights)
    _refuse("weights", w, w < 0, "0 or more")
    return w


def _finite(name: str, values: ArrayLike, shape: tuple[int, ...] | None = None) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != (1 if shape is None else len(shape)) or (shape is not None and array.shape != shape):
        wanted = "one number an event" if shape is None else f"of shape {shape}"
        raise EstimationError(f"{name} must be {wanted}, got shape {array.shape}")
    if array.size == 0:
        raise EstimationError(f"{name} must hold at least one event, got none")
    _refuse(name, array, ~np.isfinite(array), "finite")
    return array


def _refuse(name: str, values: FloatArray, illegal: NDArray[np.bool_], would_do: str) -> None:
    if illegal.any():
        row = int(np.flatnonzero(illegal.reshape(len(illegal), -1).any(axis=1))[0])
        got = values[row] if values.ndim == 1 else values[row][illegal[row]][0]
        raise EstimationError(f"{name} must be {would_do}, got {got} at event {row}")


def _same_shape(**arrays: NDArray[Any]) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise EstimationError(f"an estimator takes one number an event, got {told}")
