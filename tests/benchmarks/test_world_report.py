"""The portrait of a world: its numbers against loops over users and titles, its page, its files."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import chisquare, norm, spearmanr

from recsim_gr.benchmarks import world_report, world_sample
from recsim_gr.benchmarks.page import POLICY
from recsim_gr.benchmarks.portrait import Portrait
from recsim_gr.benchmarks.portrait_charts import FIGURES, portrait_figures
from recsim_gr.benchmarks.portrait_measures import DEBIASED, DIALS, portray
from recsim_gr.benchmarks.world_report import draw_world, facts, page, tables
from recsim_gr.benchmarks.world_sample import draw_sample
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.noise import NOISE_MODELS
from recsim_gr.replay import RatingMatrix, ReplayConfig, ReplayWorld
from recsim_gr.world import World, WorldConfig
from recsim_gr.world_base import WorldBase

N = 90
TINY = WorldConfig(n_titles=24, history_length=5, n_epochs=3, reward_noise=0.4, seed=4)
FULL = dataclasses.replace(TINY, history_median=3, cold_share=0.25, population_drift=1.0)
SMALL_REPLAY = RatingMatrix(
    np.random.default_rng(0).integers(1, 6, size=(60, 12)).astype(np.float32), name="<b>mine</b>"
)


def replayed() -> ReplayWorld:
    return ReplayWorld(ReplayConfig(path="mine.npz", history_length=4, seed=1), SMALL_REPLAY)


@pytest.fixture(scope="module", params=[TINY, FULL], ids=["tiny", "full"])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@pytest.fixture(scope="module")
def portrait(world: World) -> Portrait:
    return portray(world, N)


def propensities(world: WorldBase, user: int) -> np.ndarray:
    """(I,) of the first choice."""
    return np.exp(world.logging_log_probs(np.array([user]), np.empty((1, 0), dtype=np.int64)))[0]


def is_out(world: WorldBase, user: int) -> np.ndarray:
    return world.release <= world.behaviour(np.array([user])).epoch[0]


# ----------------------------------------------------------------------------------- numbers, by brute force


def test_satisfaction_is_that_of_all_pairs_and_of_the_log(world: World, portrait: Portrait) -> None:
    users = world.users("train", N)
    truth = world.satisfaction(users).astype(np.float64)
    pairs = np.array([truth[k, i] for k, u in enumerate(users) for i in np.flatnonzero(is_out(world, u))])
    log = world.generate_log(N)
    logged = truth[np.searchsorted(users, log.user), log.title]
    found = portrait.satisfaction
    assert found.mean == pytest.approx((pairs.mean(), logged.mean()))
    assert found.deviation == pytest.approx((pairs.std(), logged.std()))
    np.testing.assert_allclose(found.forced, np.histogram(pairs, found.edges)[0] / len(pairs))
    np.testing.assert_allclose(found.chosen, np.histogram(logged, found.edges)[0] / len(logged))


def test_variance_is_split_between_users_and_titles() -> None:
    world = World(TINY)
    truth = world.satisfaction(world.users("train", N)).astype(np.float64)
    total = truth.var()
    user, title = truth.mean(axis=1).var() / total, truth.mean(axis=0).var() / total
    assert portray(world, N).variance == pytest.approx((user, title, 1 - user - title))


def test_the_score_and_its_atom_are_the_logs(world: World, portrait: Portrait) -> None:
    score = world.generate_log(N).score
    found = portrait.score
    assert found.atom[1] == pytest.approx((score == 5).mean())
    assert found.mean[1] == pytest.approx(score.mean(), rel=1e-6)
    assert found.forced.sum() + found.atom[0] == pytest.approx(1.0)
    assert found.chosen.sum() + found.atom[1] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["gaussian", "student_t", "drift", "clickbait"])
def test_unbounded_scores_keep_their_tails(name: str) -> None:
    found = portray(World(dataclasses.replace(TINY, noise_model=name, reward_noise=1.0)), N).score
    assert found.atom == (0.0, 0.0)
    assert found.forced.sum() == pytest.approx(1.0)
    assert found.chosen.sum() == pytest.approx(1.0)
    assert found.edges[0] < 1.0
    assert found.edges[-1] > 5.0


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**20),
    st.sampled_from(sorted(NOISE_MODELS)),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([{}, {"history_median": 2, "cold_share": 0.3}, {"order_effect": 1.0, "population_drift": 0.5}]),
)
def test_reliability_and_alignment_are_the_worlds_own(seed: int, model: str, dial: float, more: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, seed=seed, **more)
    signal = portray(World(config), 40).signal
    place = signal.models.index(model), signal.dials.index(dial)
    twin = World(dataclasses.replace(config, noise_model=model, reward_noise=dial))
    reliability = twin.reliability(40)
    assert signal.within_user[place] == pytest.approx(reliability.within_user, abs=1e-9)
    assert signal.pooled[place] == pytest.approx(reliability.pooled, abs=1e-9)
    assert signal.alignment[place] == pytest.approx(twin.alignment(40), abs=1e-9)
    own = World(config).reliability(40)
    assert (signal.own["within_user"], signal.own["pooled"]) == pytest.approx(own[::-1], abs=1e-9)


def test_every_model_is_measured_at_every_dial(portrait: Portrait) -> None:
    signal = portrait.signal
    assert signal.models == tuple(NOISE_MODELS)
    assert signal.dials == DIALS
    for figures in (signal.within_user, signal.pooled, signal.alignment):
        assert np.isfinite(figures).all()
    unbiased = [signal.models.index(name) for name in ("gaussian", "student_t", "drift")]
    np.testing.assert_allclose(signal.alignment[unbiased], 1.0)
    assert (signal.alignment[signal.models.index("clickbait"), 1:] < 0.99).all()


def test_the_debiased_score_is_measured_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsim_gr.debiasing.CALIBRATION_USERS", 8)
    config = dataclasses.replace(TINY, duration_debiased=True, reward_noise=0.35)
    signal = portray(World(config), 40).signal
    assert signal.models == (DEBIASED, *NOISE_MODELS)
    twin = World(dataclasses.replace(config, reward_noise=0.6))
    assert signal.alignment[0, 6] == pytest.approx(twin.alignment(40), abs=1e-9)
    assert signal.within_user[0, 6] == pytest.approx(twin.reliability(40).within_user, abs=1e-9)
    assert signal.own["alignment"] == pytest.approx(World(config).alignment(40), abs=1e-9)


def test_popularity_counts_logged_events(world: World, portrait: Portrait) -> None:
    found = portrait.popularity
    for k, (split, counts) in enumerate((("train", found.train), ("test", found.test))):
        log = world.generate_log(N, split)
        by_title = sorted((int((log.title == i).sum()) for i in range(world.n_titles)), reverse=True)
        assert counts.tolist() == by_title
        assert found.top[k] == pytest.approx(by_title[0] / len(log))
        mean_difference = np.mean([[abs(a - b) for a in by_title] for b in by_title])
        assert found.gini[k] == pytest.approx(mean_difference / (2 * np.mean(by_title)))
    assert found.forced.sum() == found.train.sum()


def test_ratings_and_popularity_are_correlated_over_often_seen_titles(world: World, portrait: Portrait) -> None:
    log = world.generate_log(N)
    often = [i for i in range(world.n_titles) if (log.title == i).sum() >= 5]
    counts = [np.log((log.title == i).sum()) for i in often]
    means = [log.score[log.title == i].mean() for i in often]
    assert portrait.popularity.rating_correlation == pytest.approx(np.corrcoef(counts, means)[0, 1], abs=1e-6)


def test_histories_are_those_of_the_log(world: World, portrait: Portrait) -> None:
    users = world.users("train", N)
    lengths = world.history_lengths(users)
    found = portrait.histories
    assert found.length.at(0.5) == np.median(lengths)
    assert found.lengths.tolist() == [(lengths == k).mean() for k in range(1, world.config.history_length + 1)]
    log = world.generate_log(N)
    hours = [log.hours[log.user == user].astype(np.float64) for user in users]
    gaps = np.concatenate([np.diff(h) for h in hours])
    assert found.gap is not None
    assert found.days is not None
    assert found.gap.quantiles == pytest.approx(np.quantile(gaps, [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]), rel=1e-3)
    assert found.days.mean == pytest.approx(np.mean([(h[-1] - h[0]) / 24 for h in hours if len(h) > 1]), rel=1e-5)


def test_completion_is_counted_and_expected(world: World, portrait: Portrait) -> None:
    log, found = world.generate_log(N), portrait.completion
    order = np.argsort(world.durations)
    groups = np.array_split(order, len(found.minutes))
    truth = world.satisfaction(world.users("train", N)).astype(np.float64)
    who = world.behaviour(world.users("train", N))
    nu = world.config.reward_noise
    for k, titles in enumerate(groups):
        events = np.flatnonzero(np.isin(log.title, titles))
        assert found.events[k] == len(events)
        assert found.minutes[k] == pytest.approx(np.median(world.durations[titles]))
        if len(events) == 0:
            continue
        assert found.observed[k] == pytest.approx((log.watch_minutes[events] == log.duration_minutes[events]).mean())
        assert found.watched[k] == pytest.approx(np.median(log.watch_minutes[events]), rel=1e-5)
        expected = []
        for e in events:
            row = log.user[e] - log.user[0]
            fraction = (truth[row, log.title[e]] - 1) / 4
            session = np.exp(-world.durations[log.title[e]] / who.free_time[row])
            expected.append((1 - nu) * norm.cdf(np.log(fraction) / 0.05) + nu * session)
        assert found.exact[k] == pytest.approx(np.mean(expected))


def test_only_watch_time_has_an_expected_completion() -> None:
    found = portray(World(dataclasses.replace(TINY, noise_model="gaussian")), N).completion
    assert np.isnan(found.exact).all()


def test_confounding_compares_those_who_choose_with_everybody(world: World, portrait: Portrait) -> None:
    users = world.users("train", N)
    delta = world.behaviour(users).discernment
    thirds = np.empty(N, dtype=int)
    thirds[np.argsort(delta)] = np.repeat([0, 1, 2], N // 3)
    truth, score = world.satisfaction(users).astype(np.float64), world.expected_score(users)
    p = np.array([propensities(world, user) for user in users])
    out = np.array([is_out(world, user) for user in users])
    found = portrait.confounding
    for values, gap, overall in ((truth, found.gap, found.overall[0]), (score, found.gap_score, found.overall[1])):
        titles = [i for i in range(world.n_titles) if out[:, i].any()]
        forced = {i: values[out[:, i], i].mean() for i in titles}
        everyone = [(p[:, i] @ values[:, i]) / p[:, i].sum() - forced[i] for i in titles]
        assert overall == pytest.approx(np.mean(everyone))
        for third in range(3):
            member = thirds == third
            seen = [i for i in titles if p[member, i].sum() > 0]
            differences = [(p[member, i] @ values[member, i]) / p[member, i].sum() - forced[i] for i in seen]
            assert gap[third] == pytest.approx(np.mean(differences))
    assert found.discernment == pytest.approx([delta[thirds == third].mean() for third in range(3)])


def test_nothing_is_confounded_where_everybody_chooses_at_random() -> None:
    found = portray(World(dataclasses.replace(TINY, pull_strength=0.0, appeal_tail=0.0)), 60).confounding
    assert found.overall == pytest.approx((0.0, 0.0), abs=1e-9)


def test_confounding_grows_with_discernment() -> None:
    gap = portray(World(dataclasses.replace(TINY, n_titles=100)), 600).confounding.gap
    assert gap[0] < gap[1] < gap[2]
    assert gap[2] > 0.5


def test_choices_are_described_over_the_titles_that_are_out(world: World, portrait: Portrait) -> None:
    users, found = world.users("train", N), portrait.choices
    perplexity, likeness = [], []
    for user, utility, truth in zip(users, world.utilities(users), world.satisfaction(users), strict=True):
        p, out = propensities(world, user), is_out(world, user)
        perplexity.append(np.exp(-sum(q * np.log(q) for q in p[p > 0])))
        likeness.append(np.corrcoef(utility[out], truth[out].astype(np.float64))[0, 1])
    assert found.perplexity.mean == pytest.approx(np.mean(perplexity))
    assert found.perplexity.at(0.9) == pytest.approx(np.quantile(perplexity, 0.9))
    order = np.argsort(world.behaviour(users).discernment)
    first = np.array(likeness)[order[: N // 15]]
    np.testing.assert_allclose(found.likeness[0], np.quantile(first, [0.1, 0.5, 0.9]), atol=1e-6)
    assert found.acceptance == 1.0


def test_drift_is_between_different_users_of_two_epochs(world: World, portrait: Portrait) -> None:
    found, n_epochs = portrait.drift, world.config.n_epochs
    shares = np.zeros((n_epochs, 2, world.n_titles))
    for split in ("train", "test"):
        users = world.users(split, N)
        for k, (user, epoch) in enumerate(zip(users, world.behaviour(users).epoch, strict=True)):
            shares[epoch, k % 2] += propensities(world, user)
    for e in range(n_epochs):
        for f in range(n_epochs):
            out = world.release <= min(e, f)
            both = [spearmanr(shares[e, a][out], shares[f, 1 - a][out]).statistic for a in (0, 1)]
            assert found.popularity[e, f] == pytest.approx(np.mean(both))
            assert found.appeal[e, f] == pytest.approx(np.corrcoef(world.allure[e], world.allure[f])[0, 1])
    assert found.taste == pytest.approx(np.linalg.norm(world.taste_centres, axis=1))
    assert found.released == pytest.approx([(world.release <= epoch).mean() for epoch in range(n_epochs)])
    late = shares[:, :, world.release > 0].sum(axis=(1, 2)) / shares.sum(axis=(1, 2))
    assert found.cold_exposure == pytest.approx(late)


def test_forced_exposure_shows_every_title_that_is_out_alike() -> None:
    world = World(dataclasses.replace(FULL, history_median=0))
    sample = draw_sample(world, 3_000, lambda share, what: None)
    epoch = sample.users.epoch
    for e in range(world.config.n_epochs - 1):
        counts = np.bincount(sample.forced.titles[epoch == e].ravel(), minlength=world.n_titles)
        assert (counts[world.release > e] == 0).all()
        assert chisquare(counts[world.release <= e]).pvalue > 1e-3
    truth = np.take_along_axis(world.satisfaction(sample.train), sample.forced.titles, axis=1)
    np.testing.assert_array_equal(sample.forced.facts.satisfaction, truth)
    error = sample.forced.score - world.noise.expected(sample.forced.facts)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)


def test_chunks_change_nothing(world: World, portrait: Portrait, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_sample, "CHUNK_CELLS", 1)
    again = portray(world, N)
    np.testing.assert_allclose(numbers(portrait), numbers(again), rtol=1e-9, atol=1e-9)


def numbers(portrait: Portrait) -> list[float]:
    """Every number of a portrait, in order."""

    def inside(value: Any) -> list[float]:
        if isinstance(value, (int, float)):
            return [float(value)]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [number for part in parts for number in inside(part)]

    return inside(portrait.to_json())


# -------------------------------------------------------------------------------------------- page and files


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "full"
    told: list[float] = []
    assert draw_world(World(FULL), folder, N, lambda share, what: told.append(share))[1] == folder / "world.html"
    assert told == sorted(told)
    assert told[-1] <= 1.0
    return folder


@pytest.fixture(scope="module")
def html(drawn: Path) -> str:
    return (drawn / "world.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_from_outside(html: str) -> None:
    assert f'content="{POLICY}"' in html
    text = html[: html.index("<script>(() =>")]  # what comes after is Vega, which the policy holds in check
    assert "//" not in text.replace("http://www.w3.org/", "").replace("https://vega.github.io/schema/", "")
    assert "vegaEmbed" in html


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_in_the_page_and_in_two_files(name: str, drawn: Path, html: str) -> None:
    assert f'<figure id="{name}">' in html
    picture = (drawn / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert picture in html
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert (drawn / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_all_numbers_are_kept(drawn: Path) -> None:
    kept = json.loads((drawn / "world.json").read_text(encoding="utf-8"))
    assert kept["config"]["cold_share"] == 0.25
    assert kept["config"]["users"] == N
    assert kept["signal"]["own"]["dial"] == 0.4
    assert np.shape(kept["drift"]["popularity"]) == (3, 3)


def test_drawing_again_writes_the_same_bytes(drawn: Path) -> None:
    (drawn / "figures" / "mine.svg").write_text("not the portrait's", encoding="utf-8")
    before = {path: path.read_bytes() for path in sorted(drawn.rglob("*")) if path.is_file()}
    draw_world(World(FULL), drawn, N)
    assert before == {path: path.read_bytes() for path in sorted(drawn.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("change", [{"seed": 5}, {"reward_noise": 0.1}])
def test_another_world_is_not_drawn_over(change: dict[str, Any], drawn: Path) -> None:
    before = (drawn / "world.html").read_bytes()
    with pytest.raises(RunDirectoryError, match="another configuration"):
        draw_world(World(dataclasses.replace(FULL, **change)), drawn, N)
    with pytest.raises(RunDirectoryError, match="another configuration"):
        draw_world(World(FULL), drawn, N + 1)
    assert (drawn / "world.html").read_bytes() == before


def test_other_peoples_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="not empty"):
        draw_world(World(TINY), tmp_path, N)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("n_users", [-3, 0, 1, 10**9])
def test_a_number_of_users_that_makes_no_sense(n_users: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 to 200000 users"):
        draw_world(World(TINY), tmp_path / "out", n_users)
    assert not (tmp_path / "out").exists()


def test_what_does_not_apply_is_left_out() -> None:
    one = portray(World(WorldConfig(n_titles=6, history_length=1, n_epochs=1)), 4)
    assert {figure.name for figure in portrait_figures(one, "")} == set(FIGURES) - {"drift", "histories"}
    names = {fact.name for fact in facts(one)}
    assert not {name for name in names if "hours" in name or "epoch" in name or "appeal" in name}
    plain, full = ({fact.name for fact in facts(portray(World(c), N))} for c in (TINY, FULL))
    assert full - plain == {
        "mean taste, deviations from epoch 0",
        "titles that are out",
        "choices of titles that came later",
    }
    assert plain <= full


def test_carry_over_and_acceptance_are_told_where_they_are_on() -> None:
    config = dataclasses.replace(TINY, order_effect=4.0, accept=0.5)
    found = portray(World(config), 60)
    assert found.histories.neighbours is not None
    soon, late = found.histories.neighbours
    assert soon > late + 0.1
    world = World(config)
    assert found.choices.acceptance == pytest.approx(world.acceptance(world.users("train", 60)).mean())
    assert {"likeness of neighbours, soon / late", "watched of titles shown at random"} <= {
        fact.name for fact in facts(found)
    }


def test_a_world_of_real_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_report, "write_figure", lambda folder, file, figure: "<svg/>")  # drawn above
    world = replayed()
    found, path = draw_world(world, tmp_path / "out", 10_000)
    assert (found.n_users, found.n_test_users) == (world.n_users("train"), world.n_users("test"))
    assert found.drift.taste is None
    truth = SMALL_REPLAY.satisfaction[world.users("train", found.n_users)].astype(np.float64)
    assert found.satisfaction.mean[0] == pytest.approx(truth.mean())
    text = path.read_text(encoding="utf-8")
    assert "<b>mine" not in text[: text.index("<script>(() =>")]
    assert str(tmp_path) not in text


@pytest.mark.parametrize("config", [TINY, FULL], ids=["tiny", "full"])
def test_the_tables_fit_a_terminal_of_80_columns(config: WorldConfig) -> None:
    console = Console(width=80, file=io.StringIO())
    found = portray(World(config), N)
    for table in tables(found):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for fact in facts(found):
        assert fact.name in text
        assert fact.value in text


def test_the_page_of_a_portrait_shows_every_fact(portrait: Portrait) -> None:
    about = {"noise_model": "watch_time", "reward_noise": 0.4, "seed": 4, "path": "<i>x</i>"}
    text = page(portrait, about, [], [], "")
    assert "<i>x</i>" not in text
    for fact in facts(portrait):
        assert f"<td>{fact.value}</td>" in text
