"""The contract of a noise model, run over every one that is registered, and the closed forms of each."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, stats
from scipy.special import ndtri

from recsim_gr.errors import ConfigError, UnknownNameError
from recsim_gr.noise import (
    MOOD_MEMORY_HOURS,
    NOISE_MODELS,
    DurationDebiasedNoise,
    Exposure,
    GaussianNoise,
    RewardNoise,
    Scores,
    WatchTimeNoise,
    moods,
    noise_model,
    student_4_quantile,
)
from recsim_gr.randomness import uniforms

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)

models = pytest.mark.parametrize("name", NOISE_MODELS)
dials = st.floats(0.0, 1.0)
# Dials for comparisons with a standard error: a side taken once in a million events shows in no sample's
# deviation.
measurable_dials = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99))
satisfactions = st.one_of(st.sampled_from([1.0, 5.0]), st.floats(1.0, 5.0))
minutes = st.floats(0.5, 1_000.0)

FloatArray = NDArray[np.float64]
EVENTS = 20_000


def events(model: RewardNoise, n: int = EVENTS) -> FloatArray:
    """(n, k) uniforms for n events, always the same."""
    return uniforms(0, "noise", np.arange(n), model.uniforms_per_event)


def sample(model: RewardNoise, s: float, free_time: float, duration: float, n: int = EVENTS) -> Scores:
    """n events of one user with one title."""
    return model.sample(facts(s, free_time, duration, n), events(model, n))


ALLURE = 0.3


def facts(s: object, free_time: object, duration: object, n: int = 0) -> Exposure:
    """Exposures to a title of some allure, with n moods of their own (0: the mood is left out)."""
    mood = ndtri(uniforms(0, "mood", np.arange(n), 1)[:, 0]) if n else np.zeros(())
    satisfaction, minutes, length = (np.asarray(x, dtype=np.float64) for x in (s, free_time, duration))
    return Exposure(satisfaction, minutes, length, np.array(ALLURE), mood)


def expected(model: RewardNoise, s: float, free_time: float, duration: float) -> float:
    return float(model.expected(facts(s, free_time, duration)))


# ------------------------------------------------------------------------------------- every registered model


@models
@PROPERTY
@given(measurable_dials, satisfactions, minutes, minutes)
def test_the_mean_of_the_scores_is_the_expected_score(
    name: str, dial: float, s: float, free_time: float, duration: float
) -> None:
    model = noise_model(name, dial)
    scores = sample(model, s, free_time, duration).score
    four_errors = 4 * scores.std() / math.sqrt(len(scores))
    assert abs(scores.mean() - expected(model, s, free_time, duration)) <= four_errors + 1e-9


@models
@PROPERTY
@given(dials, satisfactions, minutes, minutes)
def test_samples_keep_to_their_ranges(name: str, dial: float, s: float, free_time: float, duration: float) -> None:
    model = noise_model(name, dial)
    u = events(model, 500)
    u[0], u[1] = 2.0**-54, 1.0 - 2.0**-53  # the ends of what `uniforms` can return
    drawn = model.sample(facts(s, free_time, duration, 500), u)
    assert drawn.score.shape == drawn.watched.shape == drawn.exogenous.shape == (500,)
    assert drawn.exogenous.dtype == bool
    assert np.isfinite(drawn.score).all()
    assert ((drawn.watched >= 0.0) & (drawn.watched <= 1.0)).all()
    if model.bounded:
        assert ((drawn.score >= 1.0) & (drawn.score <= 5.0)).all()


@models
@PROPERTY
@given(dials, dials)
def test_what_is_exogenous_at_one_dial_is_so_at_every_higher_one(name: str, one: float, other: float) -> None:
    low, high = (sample(noise_model(name, dial), 3.0, 40.0, 40.0, 2_000) for dial in sorted((one, other)))
    assert not (low.exogenous & ~high.exogenous).any()


@models
def test_dial_0_is_all_but_the_truth(name: str) -> None:
    model = noise_model(name, 0.0)
    truth = 1.0 + 4.0 * uniforms(1, "truth", np.arange(EVENTS), 1)[:, 0]
    drawn = model.sample(facts(truth, 40.0, 40.0, EVENTS), events(model))
    # The most noise that "all but" may mean is watch time's: 5 % of a fraction uniform on [0, 1] has a root
    # mean square of .05·4·sqrt(1/3) = .115 on the scale of scores.
    assert np.sqrt(np.mean((drawn.score - truth) ** 2)) < 0.12
    assert np.corrcoef(drawn.score, truth)[0, 1] ** 2 > 0.98
    assert not drawn.exogenous.any()
    mean = model.expected(facts(truth, 40.0, 40.0))
    # cutting at 1 costs the most at satisfaction 5, where half of the factors are cut: 4·.05·φ(0) = .080
    assert np.abs(mean - truth).max() < 0.081


@models
def test_more_dial_is_less_signal(name: str) -> None:
    truth = 1.0 + 4.0 * uniforms(1, "truth", np.arange(EVENTS), 1)[:, 0]
    signal = []
    for dial in (0.0, 0.25, 0.5, 0.75, 1.0):
        model = noise_model(name, dial)
        allure = ndtri(uniforms(0, "allure", np.arange(EVENTS), 1)[:, 0])  # each event a title of its own
        score = model.sample(facts(truth, 40.0, 40.0, EVENTS)._replace(allure=allure), events(model)).score
        signal.append(np.corrcoef(score, truth)[0, 1] ** 2)
    assert all(above > below for above, below in itertools.pairwise(signal))
    # scores of dial 1: nothing under watch time; 1.33 of 1.33 + 16 = 8 % under Gaussian noise
    assert signal[-1] < 0.1


@models
@PROPERTY
@given(dials, st.integers(0, 2**32 - 1))
def test_events_do_not_know_of_each_other(name: str, dial: float, seed: int) -> None:
    model, rng = noise_model(name, dial), np.random.default_rng(seed)
    s, free_time, duration = 1.0 + 4.0 * rng.random(30), 40.0 * rng.random(30) + 1, 90.0 * rng.random(30) + 1
    u, order = events(model, 30), rng.permutation(30)
    moods = facts(s, free_time, duration, 30).mood
    exposure = Exposure(s, free_time, duration, np.array(ALLURE), moods)
    drawn = model.sample(exposure, u)
    again = Exposure(s[order], free_time[order], duration[order], np.array(ALLURE), moods[order])
    shuffled = model.sample(again, u[order])
    for one, other in zip(drawn, shuffled, strict=True):
        np.testing.assert_array_equal(one[order], other)


@models
def test_arguments_broadcast(name: str) -> None:
    model = noise_model(name, 0.5)
    s, free_time, duration = np.full((3, 4), 2.0), np.arange(1.0, 4.0)[:, None], np.arange(1.0, 5.0)
    whole = model.expected(facts(s, free_time, duration))
    assert whole.shape == (3, 4)
    assert whole[2, 1] == pytest.approx(expected(model, 2.0, 3.0, 2.0), rel=1e-12)
    assert model.expected(facts(2.0, free_time, duration)).shape == (3, 4)
    drawn = model.sample(facts(s, free_time, duration), events(model, 12).reshape(3, 4, -1))
    assert drawn.score.shape == drawn.watched.shape == drawn.exogenous.shape == (3, 4)


@models
def test_the_expected_score_is_a_fresh_array(name: str) -> None:
    truth = np.full(3, 2.0)
    noise_model(name, 0.5).expected(facts(truth, 1.0, 1.0))[:] = 0.0
    assert truth.tolist() == [2.0, 2.0, 2.0]


@models
@pytest.mark.parametrize("dial", [1.5, -1, -1e-9, math.nan, math.inf, -math.inf, True, "0.5", None])
def test_a_dial_outside_0_to_1_is_refused_by_name(name: str, dial: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        noise_model(name, dial)  # type: ignore[arg-type]
    assert f"{NOISE_MODELS[name].__name__}.dial must be" in str(refusal.value)
    assert repr(dial) in str(refusal.value)


def test_an_unknown_model_lists_those_that_there_are() -> None:
    with pytest.raises(UnknownNameError) as refusal:
        noise_model("laplace", 0.5)
    assert str(refusal.value) == f"no noise model 'laplace'; there are {', '.join(NOISE_MODELS)}"


# ------------------------------------------------------------------------------------------------- watch time


@PROPERTY
@given(dials, satisfactions, minutes, minutes, st.floats(0.005, 1.0))
def test_watch_time_has_the_mean_that_quadrature_finds(
    dial: float, s: float, free_time: float, duration: float, small_noise: float
) -> None:
    # Ordinary: the mean of min(1, m·exp(σz)) over standard normal z, m = (s−1)/4. Exogenous: the mean of
    # min(1, T/D) over T exponential of mean τ. Both integrands have a kink, where the minimum changes sides.
    m = (s - 1.0) / 4.0

    def ordinary(z: float) -> float:
        return math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) * min(1.0, m * math.exp(small_noise * z))

    def exogenous(t: float) -> float:
        return math.exp(-t) * min(1.0, t * free_time / duration)

    kink = min(max(-math.log(m) / small_noise, -12.0), 12.0) if m > 0 else 12.0
    watched = _integral(ordinary, -12.0, kink, 12.0)
    cut = min(duration / free_time, 60.0)
    session = _integral(exogenous, 0.0, cut, 60.0)
    by_quadrature = 1.0 + 4.0 * ((1.0 - dial) * watched + dial * session)
    model = WatchTimeNoise(dial=dial, small_noise=small_noise)
    assert expected(model, s, free_time, duration) == pytest.approx(by_quadrature, abs=1e-8)


def _integral(f: object, low: float, middle: float, high: float) -> float:
    pieces = [integrate.quad(f, a, b, epsabs=1e-12, limit=200)[0] for a, b in ((low, middle), (middle, high))]
    return float(sum(pieces))


def test_watch_time_by_hand() -> None:
    # s = 3 is a fraction of 1/2, far from the cut; τ = D: E min(1, T/D) = 1 − 1/e = .632, a score of 3.528;
    # at dial 1/2: (3 + 3.528)/2 = 3.264. The small noise adds 2·(exp(.05²/2) − 1)/2 = .00125 to the mean.
    mean = expected(WatchTimeNoise(dial=0.5), 3.0, 40.0, 40.0)
    assert mean == pytest.approx(3.264241 + 0.001251, abs=2e-6)
    # One event: u = (.9, .5, ·) is ordinary at dial .5 with factor exp(0) = 1, so the score is s itself.
    # u = (.1, ·, 1 − 1/e) is exogenous: T = τ, and half of a title of 2τ is watched: 1 + 4/2 = 3.
    u = np.array([[0.9, 0.5, 0.5], [0.1, 0.5, 1.0 - math.exp(-1.0)]])
    drawn = WatchTimeNoise(dial=0.5).sample(facts(2.0, 30.0, 60.0), u)
    assert drawn.exogenous.tolist() == [False, True]
    np.testing.assert_allclose(drawn.score, [2.0, 3.0], rtol=1e-12)
    np.testing.assert_allclose(drawn.watched, [0.25, 0.5], rtol=1e-12)


@PROPERTY
@given(measurable_dials, satisfactions, minutes, minutes)
def test_watch_time_is_the_score_and_the_dial_its_exogenous_share(
    dial: float, s: float, free_time: float, duration: float
) -> None:
    drawn = sample(WatchTimeNoise(dial=dial), s, free_time, duration)
    np.testing.assert_array_equal(drawn.score, 1.0 + 4.0 * drawn.watched)
    assert abs(drawn.exogenous.mean() - dial) <= 4 * math.sqrt(dial * (1 - dial) / EVENTS) + 1e-12


@PROPERTY
@given(dials, dials, satisfactions)
def test_two_dials_of_watch_time_differ_only_where_an_event_changed_sides(one: float, other: float, s: float) -> None:
    a, b = (sample(WatchTimeNoise(dial=dial), s, 40.0, 50.0, 2_000) for dial in (one, other))
    same = a.exogenous == b.exogenous
    np.testing.assert_array_equal(a.score[same], b.score[same])


@PROPERTY
@given(satisfactions, satisfactions, minutes, minutes)
def test_watch_time_at_dial_1_carries_no_satisfaction(
    one: float, other: float, free_time: float, duration: float
) -> None:
    model = WatchTimeNoise(dial=1.0)
    a, b = (sample(model, s, free_time, duration, 500).score for s in (one, other))
    np.testing.assert_array_equal(a, b)
    assert expected(model, one, free_time, duration) == expected(model, other, free_time, duration)


@PROPERTY
@given(st.floats(0.0, 0.99), satisfactions, satisfactions, minutes, minutes)
def test_the_expected_watch_time_grows_with_satisfaction(
    dial: float, one: float, other: float, free_time: float, duration: float
) -> None:
    low, high = (expected(WatchTimeNoise(dial=dial), s, free_time, duration) for s in sorted((one, other)))
    assert low <= high + 1e-12


def test_short_titles_score_high_whatever_the_satisfaction() -> None:
    # the bias that the dial mixes in (design §2): 10 minutes of free time finish a title of 5, not one of 100
    model = WatchTimeNoise(dial=1.0)
    assert expected(model, 1.0, 10.0, 5.0) > 4.0
    assert expected(model, 5.0, 10.0, 100.0) < 1.5


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_the_small_noise_and_the_scale_are_positive(value: float) -> None:
    with pytest.raises(ConfigError, match=r"WatchTimeNoise\.small_noise must be"):
        WatchTimeNoise(dial=0.5, small_noise=value)
    with pytest.raises(ConfigError, match=r"GaussianNoise\.scale must be"):
        GaussianNoise(dial=0.5, scale=value)


# --------------------------------------------------------------------------------------------------- Gaussian


@PROPERTY
@given(dials, satisfactions, st.floats(0.1, 10.0))
def test_gaussian_noise_is_unbiased_with_deviation_dial_times_scale(dial: float, s: float, scale: float) -> None:
    model = GaussianNoise(dial=dial, scale=scale)
    assert expected(model, s, 1.0, 1.0) == s
    residual = sample(model, s, 1.0, 1.0).score - s
    # the standard error of a deviation is σ/sqrt(2n)
    assert abs(residual.std() - dial * scale) <= 4 * dial * scale / math.sqrt(2 * EVENTS) + 1e-12


def test_gaussian_noise_by_hand() -> None:
    # z of u = .975 is 1.959964; dial .5, scale 4: 3 + 2·1.959964 = 6.919928, past the end, so all is watched
    u = np.array([[0.5, 0.975, 0.5], [0.5, 0.5, 0.5]])
    drawn = GaussianNoise(dial=0.5).sample(facts(3.0, 1.0, 1.0), u)
    np.testing.assert_allclose(drawn.score, [6.919928, 3.0], atol=1e-6)
    np.testing.assert_allclose(drawn.watched, [1.0, 0.5])
    assert not drawn.exogenous.any()


# ----------------------------------------------------------------------------------------------- the other models


@given(st.floats(1e-9, 1.0 - 1e-9))
@PROPERTY
def test_the_quantiles_of_student_4_are_scipys(p: float) -> None:
    assert student_4_quantile(np.array(p)) == pytest.approx(stats.t(4).ppf(p), rel=1e-7, abs=1e-7)


def test_student_noise_has_the_gaussian_deviation_and_heavier_tails() -> None:
    u = uniforms(0, "noise", np.arange(400_000), 3)
    student, gaussian = (
        noise_model(name, 0.5).sample(facts(3.0, 1.0, 1.0), u).score for name in ("student_t", "gaussian")
    )
    assert student.std() == pytest.approx(gaussian.std(), rel=0.03)
    # P(|t₄| > 4·√2) = .0048, against .00006 beyond four deviations of a normal
    assert (np.abs(student - 3) > 8).mean() == pytest.approx(2 * stats.t(4).sf(4 * math.sqrt(2)), rel=0.15)
    assert (np.abs(gaussian - 3) > 8).mean() < 2e-4


def test_moods_are_an_ornstein_uhlenbeck_process() -> None:
    hours = np.tile(np.array([0.0, 1.0, 25.0, 25.0, 400.0]), (60_000, 1))
    drawn = moods(hours, uniforms(0, "mood", np.arange(60_000), 5))
    gap = np.abs(hours[0][:, None] - hours[0])
    assert np.abs(np.cov(drawn.T) - np.exp(-gap / MOOD_MEMORY_HOURS)).max() < 0.02
    np.testing.assert_array_equal(drawn[:, 2], drawn[:, 3])  # one moment, one mood


def test_clickbait_is_the_same_for_everyone() -> None:
    model = noise_model("clickbait", 0.5)
    titles = Exposure(np.full(3, 2.0), np.ones(()), np.ones(()), np.array([-1.0, 0.0, 2.0]))
    # 2 + .5·4·allure, for whoever watches
    np.testing.assert_allclose(model.expected(titles), [0.0, 2.0, 6.0])


@models
@PROPERTY
@given(st.floats(0.05, 1.0), st.floats(1.2, 4.8), st.floats(5.0, 200.0), st.floats(5.0, 200.0))
def test_likelihoods_sum_to_one_and_have_the_mean_of_the_scores(
    name: str, dial: float, s: float, free_time: float, duration: float
) -> None:
    model = noise_model(name, dial)
    exposure = facts(np.full(1, s), free_time, duration)
    mean = float(model.expected(facts(s, free_time, duration)))
    # an ordinary watch time is a narrow peak at s, and a title watched to its end has a probability of its own
    centre, reach = (s, 4.0) if name == "watch_time" else (mean, 400.0)
    low, high = (1.0, 5.0) if name == "watch_time" else (centre - reach, centre + reach)
    around = centre + np.array([-1.0, -0.3, -0.1, 0.1, 0.3, 1.0])
    edges = np.unique(np.clip(np.concatenate([[low], around, [high]]), low, high))

    def density(x: float) -> float:
        return float(np.exp(model.log_likelihood(np.array([x]), exposure, np.zeros(1)))[0])

    pieces = list(itertools.pairwise(edges))
    total = sum(integrate.quad(density, a, b, limit=200)[0] for a, b in pieces)
    first = sum(integrate.quad(lambda x: x * density(x), a, b, limit=200)[0] for a, b in pieces)
    if name == "watch_time":
        finished = density(5.0)
        total, first = total + finished, first + 5.0 * finished
    assert total == pytest.approx(1.0, abs=2e-4)
    assert first == pytest.approx(mean, abs=0.01)


def test_the_likelihood_of_drift_is_that_of_its_joint_normal() -> None:
    model = noise_model("drift", 0.5)
    hours, s = np.array([[0.0, 2.0, 30.0, 31.5]]), np.array([[2.0, 3.0, 4.0, 2.5]])
    score = np.array([[3.0, 3.5, 2.0, 2.2]])
    covariance = 4.0 * np.exp(-np.abs(hours.T - hours) / MOOD_MEMORY_HOURS)
    expected = stats.multivariate_normal(s[0], covariance).logpdf(score[0])
    got = model.log_likelihood(score, Exposure(s, np.ones(()), np.ones(())), hours).sum()
    assert got == pytest.approx(expected, rel=1e-9)


def test_the_likelihood_of_a_debiased_score_is_the_base_likelihood_transformed() -> None:
    # one group, F(w) = w²/2 between 5 knots (so 1/2 is the jump at the end); P(score <= x) by simulation
    knots = np.linspace(0.0, 1.0, 5)
    model = DurationDebiasedNoise(WatchTimeNoise(dial=0.6), np.empty(0), knots, (knots**2 / 2)[None])
    exposure = facts(np.full(1, 2.6), 40.0, 50.0)
    drawn = model.sample(facts(2.6, 40.0, 50.0), events(model, 200_000)).score
    edges = np.array([1.0, 1.1, 1.4, 1.7, 2.0, 2.5, 2.9])
    for low, high in itertools.pairwise(edges):
        grid = np.linspace(low, high, 4_001)[:-1] + (high - low) / 8_000
        likelihood = np.exp(model.log_likelihood(grid, exposure, np.zeros(1)))
        share = ((drawn >= low) & (drawn < high)).mean()
        assert likelihood.mean() * (high - low) == pytest.approx(share, abs=4 * math.sqrt(share / 200_000) + 2e-3)
    finished = float(np.exp(model.log_likelihood(np.array([4.0]), exposure, np.zeros(1)))[0])
    assert finished == pytest.approx((drawn == 4.0).mean(), abs=0.005)
    assert drawn.mean() == pytest.approx(float(model.expected(facts(2.6, 40.0, 50.0))), abs=0.02)
    assert (drawn**2).mean() == pytest.approx(float(model.second_moment(facts(2.6, 40.0, 50.0))), abs=0.1)
