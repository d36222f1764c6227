"""The Bayes reference against quadrature, finite differences, simulation-based calibration and its own worlds."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, ndtri
from scipy.stats import beta as beta_law
from scipy.stats import chisquare

from recsim_gr import BayesConfig, BayesReference, World, WorldConfig
from recsim_gr.bayes_model import History, UserLaw
from recsim_gr.errors import ConfigError, PolicyError
from recsim_gr.noise import DurationDebiasedNoise, Exposure, WatchTimeNoise
from recsim_gr.observations import Observations
from recsim_gr.policy import Policy
from recsim_gr.randomness import uniforms
from recsim_gr.world_base import CARRY_OVER_HOURS, HOURS_BETWEEN_SESSIONS, HOURS_WITHIN_SESSION

FloatArray = NDArray[np.float64]


def small_world(**settings: Any) -> World:
    """30 titles, 6 events, 3 dimensions of taste."""
    defaults: dict[str, Any] = {"n_titles": 30, "history_length": 6, "taste_dimensions": 3, "n_genres": 5}
    return World(WorldConfig(**{**defaults, "seed": 1_000, **settings}))


# ---------------------------------------------------------------------------------------------------- brute force


class Exact(NamedTuple):
    satisfaction: FloatArray
    next_probabilities: FloatArray
    log_evidence: float


def by_quadrature(world: World, observations: Observations) -> Exact:
    """One context of a world with one dimension of taste, on a grid over all five latents.

    Given θ the scores (leniency, free time) and the titles (outside suggestion, discernment) are independent, so two
    three-dimensional grids do; nothing is shared with the sampler but the world's config and the noise's density.
    """
    config = world.config
    assert config.taste_dimensions == 1
    n = int(observations.length[0])
    titles, scores = observations.titles[0, :n], observations.scores[0, :n].astype(np.float64)
    hours, epoch = observations.times[0, :n].astype(np.float64), int(observations.epoch[0])
    timeless = not isinstance(world.noise, WatchTimeNoise | DurationDebiasedNoise)
    z, prior = gauss(801 if "mood" in world.noise.uses else 201)  # of θ
    theta = z + world.taste_centres[epoch, 0]

    # scores: (θ, b, τ)
    zb, law_b = gauss(401 if "mood" in world.noise.uses else 201)
    zt, law_t = gauss(1 if timeless else 25)
    traits, quality = world.traits[:, 0], world.quality
    minutes = config.free_time_median_minutes * np.exp(config.free_time_log_deviation * zt)
    scored = np.zeros((len(z), len(zb)))
    for k, x in enumerate(theta):
        logit = x * traits[titles] + quality[titles] + config.leniency_deviation * zb[:, None]  # (b, T)
        s = 1.0 + 4.0 * expit(config.satisfaction_slope * logit)
        facts = Exposure(s[:, None], minutes[:, None], world.durations[titles], world.allure[epoch, titles])
        value = np.broadcast_to(world.noise.log_likelihood(scores, facts, hours), (len(zb), len(zt), n)).sum(axis=2)
        scored[k] = np.exp(value) @ law_t

    # titles: (θ, ε, δ); the quantiles of δ evenly, since its law may be U-shaped
    ze, law_e = gauss(31)
    delta = beta_law.ppf((np.arange(40) + 0.5) / 40, config.discernment_alpha, config.discernment_beta)
    pull = delta * theta[:, None, None] + np.sqrt(1.0 - delta**2) * ze[:, None]  # (θ, ε, δ)
    utility = config.pull_strength * pull[..., None] * traits + (1.0 - delta)[:, None] * world.appeal[epoch]
    utility[..., world.release > epoch] = -np.inf
    log_chosen = np.zeros(pull.shape)
    for step in range(n + 1):
        shown = utility.copy()
        shown[..., titles[:step]] = -np.inf
        if step == n:
            following = mean_softmax(world, shown, titles, hours)
        else:
            shown += world.carry_over(titles[None, :step], hours[None, :step], hours[step : step + 1])[0]
            log_chosen += shown[..., titles[step]] - np.log(np.exp(shown).sum(axis=-1))
    mass = np.exp(log_chosen) * (law_e[:, None] / 40)
    chosen = mass.sum(axis=(1, 2))  # (θ,)

    weight = prior * chosen * (scored @ law_b)
    evidence = weight.sum()
    joint = (prior * chosen)[:, None] * scored * law_b / evidence  # (θ, b)
    s_bar = np.zeros(world.n_titles)
    for i in range(world.n_titles):
        logit = (theta * traits[i] + quality[i])[:, None] + config.leniency_deviation * zb
        s_bar[i] = (joint * (1.0 + 4.0 * expit(config.satisfaction_slope * logit))).sum()
    by_theta = np.einsum("ked,kedi->ki", mass, following)
    next_probabilities = (prior * (scored @ law_b)) @ by_theta / evidence
    return Exact(s_bar, next_probabilities, float(np.log(evidence)))


def mean_softmax(world: World, shown: FloatArray, titles: NDArray[np.int64], hours: FloatArray) -> FloatArray:
    """Of the next choice; where titles carry over, averaged over 8 quantiles of either kind of gap."""
    if world.config.order_effect == 0:
        return np.exp(shown) / np.exp(shown).sum(axis=-1, keepdims=True)
    total, u = np.zeros(shown.shape), (np.arange(8) + 0.5) / 8
    for share, mean in ((0.25, HOURS_BETWEEN_SESSIONS), (0.75, HOURS_WITHIN_SESSION)):
        for gap in -mean * np.log(u):
            if gap > 20 * CARRY_OVER_HOURS:
                gap = 20 * CARRY_OVER_HOURS  # nothing is left
            then = shown + world.carry_over(titles[None], hours[None], hours[-1:] + gap)[0]
            total += share / 8 * np.exp(then) / np.exp(then).sum(axis=-1, keepdims=True)
    return total


def gauss(n: int) -> tuple[FloatArray, FloatArray]:
    """Nodes over ±5 of a standard normal, and their weights."""
    z = np.linspace(-5, 5, n) if n > 1 else np.zeros(1)
    law = np.exp(-0.5 * z * z)
    return z, law / law.sum()


TINY: dict[str, Any] = {"n_titles": 7, "taste_dimensions": 1, "n_genres": 3, "history_length": 4, "seed": 1_001}

WORLDS: dict[str, dict[str, Any]] = {
    "watch_time": {"reward_noise": 0.35},
    "watch_time, little noise": {"reward_noise": 0.05},
    "gaussian": {"noise_model": "gaussian", "reward_noise": 0.2},
    "student_t, drifting tastes": {"noise_model": "student_t", "reward_noise": 0.3, "population_drift": 1.0},
    "drift": {"noise_model": "drift", "reward_noise": 0.3},
    "clickbait, releases": {"noise_model": "clickbait", "reward_noise": 0.5, "cold_share": 0.3},
    "order": {"noise_model": "gaussian", "reward_noise": 0.3, "order_effect": 2.0},
    "debiased": {"reward_noise": 0.5, "duration_debiased": True},
}


@pytest.mark.parametrize("name", WORLDS)
def test_agrees_with_quadrature(name: str) -> None:
    world = World(WorldConfig(**{**TINY, **WORLDS[name]}))
    # a late epoch, to which tastes have moved, and an early one, where titles are still to come
    contexts = [world.contexts(1, seed=1), world.contexts(1, seed=2, split="train")]
    many = [BayesReference(world, BayesConfig(particles=4_000, least_share=0.8, moves=2, seed=s)) for s in (0, 1)]
    for context in contexts:
        exact = by_quadrature(world, context.observations)
        posteriors = [reference.posterior(context.observations) for reference in many]
        satisfaction = np.mean([p.satisfaction[0] for p in posteriors], axis=0)
        # with few events and one dimension the posterior is two-humped, its deviation .9: a hard case for its size
        assert satisfaction == pytest.approx(exact.satisfaction, abs=0.04)
        next_probabilities = np.exp(posteriors[0].next_log_probs[0])
        assert next_probabilities == pytest.approx(exact.next_probabilities, abs=0.01)
        assert posteriors[0].log_evidence[0] == pytest.approx(exact.log_evidence, abs=0.15)
        assert (next_probabilities[context.observations.unavailable()[0]] == 0).all()


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradients_are_those_of_the_likelihood(name: str, beta: float) -> None:
    world = small_world(**WORLDS[name])
    context = next(iter(BayesReference(world)._contexts(world.contexts(1).observations)))
    law = UserLaw(world)
    history = History(law, context.titles, context.scores, context.hours, context.epoch)
    rng = np.random.default_rng(0)
    z = 0.7 * rng.standard_normal((law.dimensions, 40))
    flags = None
    for _ in range(2):
        gradient = history(z, beta, flags).gradient
        for k in range(law.dimensions):
            step = np.zeros_like(z)
            step[k] = 0.02  # twice the tables' nodes: their slopes are piecewise constant; float32 titles want no less
            up, down = (history(x, beta, flags).log_likelihood for x in (z + step, z - step))
            numeric = (up - down) / 0.04
            error = np.abs(gradient[k] - numeric) / (1.0 + np.abs(numeric))
            assert np.median(error) < 0.02, k
        if not history.mixture:
            break
        flags = rng.random((history.n_events, 40)) < 0.5


def test_flags_summed_out_are_the_likelihood() -> None:
    world = small_world(history_length=3, reward_noise=0.4)
    context = next(iter(BayesReference(world)._contexts(world.contexts(1).observations)))
    law = UserLaw(world)
    history = History(law, context.titles, context.scores, context.hours, context.epoch)
    z = np.random.default_rng(1).standard_normal((law.dimensions, 20))
    for beta in (0.2, 1.0):
        settings = [np.array([[k >> t & 1] for t in range(3)], dtype=bool) for k in range(8)]
        total = np.logaddexp.reduce([history(z, beta, np.tile(s, 20)).log_likelihood for s in settings])
        assert total == pytest.approx(history(z, beta).log_likelihood, rel=1e-9)


def test_likelihood_is_the_worlds_own() -> None:
    """At the true latents: the propensities that the world gives its events, and the noise's density."""
    for settings in ({"reward_noise": 0.35}, {"order_effect": 1.5}, {"cold_share": 0.4, "population_drift": 1.0}):
        world = small_world(**settings)
        users = world.users("train", 5)
        events, contexts = world.draw_events(users, 6), world.contexts_of(users)
        law, z, who = UserLaw(world), true_latents(world, users), world.behaviour(users)
        for row, context in enumerate(BayesReference(world)._contexts(contexts.observations)):
            history = History(law, context.titles, context.scores, context.hours, context.epoch)
            valued = history(z[:, row : row + 1], 1.0)
            assert valued.choices[0] == pytest.approx(events.log_propensities[row].sum(), abs=2e-4)
            satisfaction = world.satisfaction(users[row : row + 1])[0, context.titles].astype(np.float64)
            facts = Exposure(satisfaction, who.free_time[row], world.durations[context.titles])
            scored = world.noise.log_likelihood(context.scores, facts, context.hours).sum()
            assert valued.log_likelihood[0] - valued.choices[0] == pytest.approx(scored, abs=0.02)


# ------------------------------------------------------------------------------------------------------- calibration


def true_latents(world: World, users: NDArray[np.int64]) -> FloatArray:
    """(2d + 3, n) standard normals that the users were drawn from."""
    seed, d = world.config.seed, world.config.taste_dimensions
    behaviour = uniforms(seed, "behaviour", users, 3)
    parts = [
        uniforms(seed, "taste", users, d),
        uniforms(seed, "pull", users, d),
        behaviour[:, 1:2],
        uniforms(seed, "leniency", users, 1),
        behaviour[:, 2:3],
    ]
    return ndtri(np.concatenate(parts, axis=1)).T


QUANTITIES = ("taste", "pull", "leniency", "discernment", "free_time", "satisfaction", "log_likelihood")


def ranks(world: World, n_users: int, draws: int = 63) -> dict[str, NDArray[np.int64]]:
    """Ranks of the truth among posterior draws, for users of the world itself (Talts et al. 2018): uniform on
    0 … ``draws`` if and only if the posteriors are right."""
    users = world.users("train", n_users)
    observations, satisfaction = world.contexts_of(users).observations, world.satisfaction(users)
    z, who, reference = true_latents(world, users), world.behaviour(users), BayesReference(world)
    law, rng = UserLaw(world), np.random.default_rng(0)
    found: dict[str, list[int]] = {name: [] for name in QUANTITIES}
    for row, context in enumerate(reference._contexts(observations)):
        one = slice(row, row + 1)
        drawn = reference.draws(observations[one])[0]
        title = rng.choice(np.flatnonzero(~observations[one].unavailable()[0]))
        history = History(law, context.titles, context.scores, context.hours, context.epoch)
        pairs = (
            (drawn.taste[0], world.taste(users[one])[0, 0]),
            (drawn.pull[0], world.pull_vectors(users[one])[0, 0]),
            (drawn.leniency, world.leniency(users[one])[0]),
            (drawn.discernment, who.discernment[row]),
            (drawn.free_time, who.free_time[row]),
            (drawn.satisfaction[title], satisfaction[row, title]),
            (drawn.log_likelihood, history(z[:, one], 1.0).log_likelihood[0]),
        )
        chosen = rng.choice(len(drawn.leniency), draws, replace=False)
        for name, (values, truth) in zip(QUANTITIES, pairs, strict=True):
            found[name].append(int((values[chosen] < truth).sum()))
    return {name: np.array(values) for name, values in found.items()}


def assert_uniform(found: dict[str, NDArray[np.int64]], bins: int = 8, draws: int = 63) -> None:
    """By chi-square, Bonferroni over the quantities: one false alarm in a thousand."""
    p_values = {n: chisquare(np.bincount(r * bins // (draws + 1), minlength=bins)).pvalue for n, r in found.items()}
    assert min(p_values.values()) > 1e-3 / len(p_values), p_values


CALIBRATED: dict[str, dict[str, Any]] = {
    "watch_time 0.35": {"reward_noise": 0.35},
    "watch_time 0": {"reward_noise": 0.0},
    "gaussian": {"noise_model": "gaussian", "reward_noise": 0.2},
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_posteriors_are_calibrated(name: str) -> None:
    assert_uniform(ranks(small_world(**CALIBRATED[name]), 200))


AT_LENGTH: dict[str, dict[str, Any]] = {
    "watch_time 0.6": {"reward_noise": 0.6},
    "watch_time 1": {"reward_noise": 1.0},
    "student_t": {"noise_model": "student_t", "reward_noise": 0.2},
    "drift": {"noise_model": "drift", "reward_noise": 0.3},
    "clickbait": {"noise_model": "clickbait", "reward_noise": 0.3},
    "debiased": {"reward_noise": 0.35, "duration_debiased": True},
    "order": {"reward_noise": 0.35, "order_effect": 1.5},
    "releases, drifting tastes": {"reward_noise": 0.35, "cold_share": 0.3, "population_drift": 2.0},
    "short histories": {"reward_noise": 0.35, "history_length": 12, "history_median": 4},
    **CALIBRATED,
}


@pytest.mark.benchmark
@pytest.mark.parametrize("name", AT_LENGTH)
def test_posteriors_are_calibrated_at_length(name: str) -> None:
    """The default world but for its catalogue: a minute or two each."""
    world = World(WorldConfig(**{"n_titles": 200, "seed": 1_000, **AT_LENGTH[name]}))
    assert_uniform(ranks(world, 400))


@pytest.fixture(scope="module")
def answered() -> tuple[World, Any, Any]:
    world = small_world(reward_noise=0.35)
    contexts = world.contexts(150)
    return world, contexts, BayesReference(world).posterior(contexts.observations)


def test_expected_satisfaction_is_calibrated(answered: tuple[World, Any, Any]) -> None:
    """The regression of s on E[s | x] has slope 1, and errors are as large as the posterior says."""
    world, contexts, posterior = answered
    truth, unseen = world.satisfaction(contexts.users).astype(np.float64), ~contexts.observations.seen()
    slopes = []
    for half in np.split(np.arange(150), 10):  # clustered by user: ten groups give the error
        x, y = posterior.satisfaction[half][unseen[half]], truth[half][unseen[half]]
        slopes.append(np.polyfit(x, y, 1)[0])
    assert abs(np.mean(slopes) - 1.0) < 3.5 * np.std(slopes, ddof=1) / np.sqrt(10)
    squared = ((posterior.satisfaction - truth) ** 2).mean(axis=1) - (posterior.deviation**2).mean(axis=1)
    assert abs(squared.mean()) < 3.5 * squared.std() / np.sqrt(150)


def test_predictive_is_calibrated(answered: tuple[World, Any, Any]) -> None:
    """−log p(next) is on average the predictive's own entropy, and no policy without the user's identity is better."""
    world, contexts, posterior = answered
    log_probs = posterior.next_log_probs
    surprise = -np.take_along_axis(log_probs, contexts.next_titles[:, None], axis=1)[:, 0]
    p = np.exp(log_probs)
    entropy = -np.where(p > 0, p * np.where(p > 0, log_probs, 0.0), 0.0).sum(axis=1)
    gap = surprise - entropy
    assert abs(gap.mean()) < 3.5 * gap.std() / np.sqrt(len(gap))
    counts = np.bincount(world.contexts(2_000, seed=1).next_titles, minlength=world.n_titles) + 1.0
    popular = np.where(contexts.observations.seen(), 0.0, counts)
    popular /= popular.sum(axis=1, keepdims=True)
    other = -np.log(np.take_along_axis(popular, contexts.next_titles[:, None], axis=1)[:, 0])
    assert surprise.mean() < other.mean() - 0.05


def test_two_runs_agree(answered: tuple[World, Any, Any]) -> None:
    """The Monte Carlo error of E[s], by another seed: below 0.03 points."""
    world, contexts, posterior = answered
    other = BayesReference(world, BayesConfig(seed=1)).posterior(contexts.observations[slice(0, 40)])
    difference = other.satisfaction - posterior.satisfaction[:40]
    assert np.sqrt((difference**2).mean() / 2) < 0.03
    assert not np.array_equal(other.satisfaction, posterior.satisfaction[:40])


# ---------------------------------------------------------------------------------------------------------- interface


def test_answers_do_not_depend_on_the_batch(answered: tuple[World, Any, Any]) -> None:
    world, contexts, posterior = answered
    rows = np.array([7, 3, 3])
    alone = BayesReference(world).posterior(contexts.observations[rows])
    for part, whole in zip(alone[:5], posterior[:5], strict=True):
        assert np.array_equal(part, whole[rows])


def test_padding_changes_nothing() -> None:
    world = small_world(history_median=4, reward_noise=0.35)
    observations = world.contexts(4).observations
    assert len(set(observations.length.tolist())) > 1
    wider = Observations(
        np.pad(observations.titles, ((0, 0), (0, 3)), constant_values=world.n_titles),
        np.pad(observations.scores, ((0, 0), (0, 3))),
        np.pad(observations.times, ((0, 0), (0, 3))),
        observations.length,
        observations.epoch,
        world.n_titles,
        observations.catalogue,
    )
    reference = BayesReference(world)
    assert np.array_equal(reference.posterior(observations).worth, BayesReference(world).posterior(wider).worth)


@pytest.mark.parametrize("order_effect", [0.0, 1.0])
def test_an_empty_history_is_the_prior(order_effect: float) -> None:
    world = small_world(order_effect=order_effect, population_drift=1.0)
    n = world.n_titles
    empty = Observations(
        titles=np.full((1, 2), n),
        scores=np.zeros((1, 2), np.float32),
        times=np.zeros((1, 2), np.float32),
        length=np.zeros(1, np.int64),
        epoch=np.array([world.config.n_epochs - 1]),
        n_titles=n,
    )
    posterior = BayesReference(world, BayesConfig(particles=2_000)).posterior(empty)
    users = world.users("test", 20_000)
    first = np.exp(world.logging_log_probs(users, np.empty((len(users), 0), dtype=np.int64)))
    assert posterior.satisfaction[0] == pytest.approx(world.satisfaction(users).mean(axis=0), abs=0.04)
    assert np.exp(posterior.next_log_probs[0]) == pytest.approx(first.mean(axis=0), abs=0.006)
    assert posterior.log_evidence[0] == pytest.approx(0.0, abs=1e-9)


def test_is_a_policy_that_infers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = small_world(reward_noise=0.35, accept=0.6)
    reference = BayesReference(world, BayesConfig(particles=64, final_moves=2))
    assert isinstance(reference, Policy)
    calls: list[str] = []
    whole = BayesReference._summary

    def counted(self: BayesReference, context: Any) -> Any:
        calls.append(context.key)
        return whole(self, context)

    monkeypatch.setattr(BayesReference, "_summary", counted)
    evaluation = world.evaluate(reference, n_users=12)
    assert len(calls) == 12
    observations = world.contexts(12).observations
    assert evaluation["nll"] > 0
    assert np.array_equal(reference.scores(observations), reference.posterior(observations).worth)
    assert (reference.posterior(observations).worth < reference.posterior(observations).satisfaction).all()


def test_worth_is_that_of_the_world() -> None:
    """At known latents acceptance is the world's own."""
    world = small_world(accept=0.8, cold_share=0.3)
    users = world.users("train", 40)
    epochs, law, z = world.behaviour(users).epoch, UserLaw(world), true_latents(world, users)
    exact = world.acceptance(users)
    for row in range(40):
        epoch = int(epochs[row])
        out = world.release <= epoch
        accepted = law.acceptance(law.latents(z[:, row : row + 1], epoch), epoch, out)[:, 0]
        assert accepted[out] == pytest.approx(exact[row][out], abs=1e-5)


def test_no_contexts_are_no_answers() -> None:
    world = small_world()
    posterior = BayesReference(world).posterior(world.contexts(1).observations[slice(0, 0)])
    assert posterior.satisfaction.shape == posterior.next_log_probs.shape == (0, world.n_titles)
    assert posterior.diagnostics.acceptance.shape == (0,)


def test_what_cannot_be_is_named() -> None:
    world = small_world()
    with pytest.raises(ConfigError, match="simulated World"):
        BayesReference(object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="particles"):
        BayesConfig(particles=10)
    with pytest.raises(ConfigError, match="least_share"):
        BayesConfig(least_share=1.0)
    reference = BayesReference(world)
    with pytest.raises(PolicyError, match="titles"):
        reference.posterior(small_world(n_titles=31).contexts(1).observations)
    late = world.contexts(1).observations
    with pytest.raises(PolicyError, match="epoch 9"):
        reference.posterior(
            Observations(late.titles, late.scores, late.times, late.length, np.array([9]), late.n_titles)
        )


class Tangled:
    """Watch time whose exogenous sessions follow satisfaction: no sum of two functions."""

    bounded = True
    uses: frozenset[str] = frozenset()

    def log_likelihood(self, score: FloatArray, exposure: Exposure, hours: FloatArray) -> FloatArray:
        return -score * exposure.satisfaction * exposure.free_time / 100.0


def test_foreign_noise_is_refused() -> None:
    world = small_world()
    world.__dict__["noise"] = Tangled()
    with pytest.raises(ConfigError, match="Tangled"):
        BayesReference(world)


def test_the_reference_of_another_world_is_refused() -> None:
    one, other = (World(WorldConfig(n_titles=12, history_length=3, seed=seed)) for seed in (0, 1))
    with pytest.raises(ConfigError, match="BayesReference knows another world"):
        other.evaluate(BayesReference(one), 3)
