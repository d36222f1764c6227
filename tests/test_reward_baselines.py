"""The baselines: by hand, against brute force, and what credibility estimates where it is known."""

import numpy as np
import pytest

from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Observations
from recsim_gr.reward_baselines import BASELINES, Additive, RewardBaseline, TitleMean, UserMean, credibility


def log_of(histories: list[list[tuple[int, float]]], n_titles: int) -> InteractionLog:
    """A log with these (title, score) events, one list a user."""
    lengths = [len(history) for history in histories]
    events = [event for history in histories for event in history]
    steps = np.concatenate([np.arange(length) for length in lengths])
    return InteractionLog(
        user=np.repeat(np.arange(len(histories)), lengths),
        epoch=np.zeros(len(events), dtype=np.int64),
        step=steps,
        hours=0.5 * steps.astype(np.float32),
        title=np.array([title for title, _ in events]),
        duration_minutes=np.full(len(events), 30.0),
        watch_minutes=np.full(len(events), 15.0),
        score=np.array([score for _, score in events]),
        n_titles=n_titles,
    )


def synthetic(users: int, seed: int, spread: tuple[float, float, float] = (0.5, 0.3, 0.6)) -> InteractionLog:
    """r = 3 + b_u + c_a + noise, cut to [1, 5], with those deviations; 30 titles, the same for every seed, of which a
    user sees 4 to 12."""
    rng = np.random.default_rng(seed)
    effect = np.random.default_rng(0).normal(0, spread[1], 30)
    histories = []
    for level in rng.normal(0, spread[0], users):
        titles = rng.permutation(30)[: rng.integers(4, 13)]
        scores = 3 + level + effect[titles] + rng.normal(0, spread[2], len(titles))
        histories.append([(int(a), float(np.clip(r, 1, 5))) for a, r in zip(titles, scores, strict=True)])
    return log_of(histories, 30)


def prefixes(log: InteractionLog) -> tuple[list[tuple[int, int]], Observations]:
    """(row, step) of every event, and the contexts before them."""
    whole = log.sequences()
    events = [(row, step) for row, length in enumerate(whole.length) for step in range(length)]
    rows, steps = np.array(events).T
    past = np.arange(whole.titles.shape[1]) < steps[:, None]
    return events, Observations(
        titles=np.where(past, whole.titles[rows], log.n_titles),
        scores=np.where(past, whole.scores[rows], np.float32(0)),
        times=np.where(past, whole.times[rows], np.float32(0)),
        length=steps,
        epoch=whole.epoch[rows],
        n_titles=log.n_titles,
    )


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_credibility_by_hand() -> None:
    """Groups {1, 3} and {4, 6, 5}: means 2 and 5, overall 3.8. Within: (1 + 1 + 1 + 1 + 0)/(5 − 2) = 4/3. Between:
    2·1.8² + 3·1.2² = 10.8. Variance of means (10.8 − 4/3)/(5 − 13/5) = 3.9444; k = 1.3333/3.9444."""
    k = credibility(np.array([1.0, 4.0, 3.0, 6.0, 5.0]), np.array([0, 2, 0, 2, 2]))
    assert k == pytest.approx((4 / 3) / ((10.8 - 4 / 3) / 2.4))


def test_groups_that_do_not_differ_have_no_credibility() -> None:
    assert credibility(np.array([1.0, 5.0, 1.0, 5.0]), np.array([0, 0, 1, 1])) == np.inf
    assert credibility(np.array([1.0, 5.0]), np.array([0, 1])) == np.inf  # a score each: nobody can tell
    assert credibility(np.array([1.0, 5.0, 2.0]), np.array([0, 0, 0])) == np.inf
    assert credibility(np.array([1.0, 1.0, 4.0, 4.0]), np.array([0, 0, 1, 1])) == 0.0


def test_the_users_own_mean_by_hand() -> None:
    """k = 5 and m = 3: (0 + 15)/5, then (4 + 15)/6, then (4 + 2 + 15)/7."""
    model, histories = UserMean(3.0, 5.0), Histories(log_of([[(0, 4.0), (1, 2.0), (2, 5.0)], [(3, 1.0)]], 5))
    got = model.mean_at(histories)
    np.testing.assert_allclose(got[0], [3.0, 19 / 6, 3.0], rtol=1e-6)
    assert got[1, 0] == 3.0
    after = model.mean(histories.observations)
    np.testing.assert_allclose(after, np.repeat([[26 / 8], [16 / 6]], 5, axis=1), rtol=1e-6)


def test_the_titles_mean_by_hand() -> None:
    """m = 2.5. Title 0: 4, 1; title 1: 2; title 3: 3. With the log's own k."""
    log = log_of([[(0, 4.0), (1, 2.0)], [(3, 3.0), (0, 1.0)]], 5)
    model = TitleMean.fit(log)
    k = model.strength
    assert k == credibility(log.score, log.title) == np.inf
    np.testing.assert_allclose(model.by_title, 2.5)
    given = TitleMean(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 1.0)
    np.testing.assert_array_equal(given.mean_at(log), [[1, 2], [4, 1]])
    np.testing.assert_array_equal(given.mean_at(log, np.array([[4, 4], [2, 5]])), [[5, 5], [3, 1]])  # 5 is padding
    np.testing.assert_array_equal(given.mean(log.sequences()), [[1, 2, 3, 4, 5]] * 2)


def test_without_strength_means_are_means() -> None:
    user = UserMean(3.0, 0.0)
    log = log_of([[(0, 4.0), (1, 2.0), (2, 5.0)], [(3, 1.0), (0, 1.0)]], 5)
    np.testing.assert_allclose(user.mean_at(log)[0], [3.0, 4.0, 3.0])
    np.testing.assert_allclose(user.mean(log.sequences())[:, 0], [11 / 3, 1.0], rtol=1e-6)


def test_the_additive_model_by_hand() -> None:
    """m = 3, c = (1, −1, 0), k = 1. After (0, 5) the user is 5 − 4 = 1 above, half of it believed: title 1 scores
    3 − 1 + ½; after (1, 2) too the excess is (1 + 0)/3."""
    model = Additive(3.0, np.array([1.0, -1.0, 0.0]), 1.0, 2.0)
    log = log_of([[(0, 5.0), (1, 2.0)]], 3)
    np.testing.assert_allclose(model.mean_at(log), [[4.0, 2.5]], rtol=1e-6)
    np.testing.assert_allclose(model.mean(log.sequences()), [[4 + 1 / 3, 2 + 1 / 3, 3 + 1 / 3]], rtol=1e-6)


# -- what is fitted ---------------------------------------------------------------------------------------------------


def test_credibility_finds_the_variances_that_it_was_made_with() -> None:
    """20,000 groups of two to six scores, σ² = 0.64, τ² = 0.16: k = 4."""
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(20_000), rng.integers(2, 7, 20_000))
    scores = 3 + rng.normal(0, 0.4, 20_000)[group] + rng.normal(0, 0.8, len(group))
    assert credibility(scores, group) == pytest.approx(4.0, rel=0.05)


def test_additive_effects_solve_their_equations() -> None:
    """The ridge problem of both effects at once, by dense linear algebra, at the strengths that were found."""
    log = synthetic(60, 4)
    model = Additive.fit(log)
    users = log.n_users
    user = np.cumsum(log.step == 0) - 1
    design = np.zeros((len(log), users + 30))
    design[np.arange(len(log)), user] = 1.0
    design[np.arange(len(log)), users + log.title] = 1.0
    ridge = np.diag([model.strength] * users + [model.title_strength] * 30)
    solved = np.linalg.solve(design.T @ design + ridge, design.T @ (log.score - model.overall))
    np.testing.assert_allclose(model.by_title, solved[users:], atol=2e-3)


def test_each_beats_the_plain_mean_and_the_two_together_beat_each() -> None:
    train, histories = synthetic(800, 5), Histories(synthetic(800, 6))
    valid, scores = histories.valid.numpy(), histories.observations.scores
    errors = {kind: np.mean((kind.fit(train).mean_at(histories) - scores)[valid] ** 2) for kind in BASELINES}
    plain = np.mean((train.score.mean() - scores[valid]) ** 2)
    assert max(errors[UserMean], errors[TitleMean]) < 0.95 * plain
    assert errors[Additive] < 0.9 * min(errors[UserMean], errors[TitleMean])


def test_noise_has_no_groups() -> None:
    """Scores that are noise alone: strengths are huge, and all baselines say the mean."""
    log = synthetic(800, 6, (0.0, 0.0, 0.6))
    for kind in BASELINES:
        assert np.abs(kind.fit(log).mean(log.sequences()) - log.score.mean()).max() < 0.12


# -- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASELINES)
def test_what_is_said_at_a_prefix_is_what_is_said_of_that_context(kind: type[RewardBaseline]) -> None:
    log = synthetic(20, 7)
    model = kind.fit(log)
    events, observations = prefixes(log)
    at, mean = model.mean_at(log), model.mean(observations)
    forced = np.random.default_rng(8).integers(30, size=at.shape)
    at_forced = model.mean_at(Histories(log), forced)
    titles = log.sequences().titles
    assert at.dtype == mean.dtype == np.float32
    assert mean.shape == (len(events), 30)
    for index, (row, step) in enumerate(events):
        assert at[row, step] == pytest.approx(mean[index, titles[row, step]], abs=1e-5)
        assert at_forced[row, step] == pytest.approx(mean[index, forced[row, step]], abs=1e-5)


@pytest.mark.parametrize("kind", BASELINES)
def test_titles_that_are_none_are_refused(kind: type[RewardBaseline]) -> None:
    log = synthetic(5, 9)
    model = kind.fit(log)
    if kind is not UserMean:  # which does not ask what the title is
        width = Histories(log).longest
        for titles in (np.zeros((5, 1), dtype=np.int64), np.full((5, width), -1)):
            with pytest.raises(ValueError, match="titles must be"):
                model.mean_at(log, titles)
