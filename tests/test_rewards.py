"""The reward ensemble: fitting, predictions, intervals, saving, and a world that it must understand."""

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from recsim_gr.backbones import HSTU, Backbone, HSTUConfig
from recsim_gr.errors import CheckpointError, ConfigError, TrainingError
from recsim_gr.histories import Histories, HistorySource, tensors
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Observations
from recsim_gr.pretraining import pretrain
from recsim_gr.reward_baselines import BASELINES
from recsim_gr.reward_heads import FORMS, Scorer
from recsim_gr.reward_tables import table_key
from recsim_gr.rewards import (
    RewardEnsemble,
    RewardEnsembleConfig,
    fit_reward_ensemble,
    load_reward_ensemble,
    mean_squared_error,
    squared_error,
)
from recsim_gr.training import TrainingConfig, TrainingRecord
from recsim_gr.world import World, WorldConfig

SHORT = TrainingConfig(steps=10, batch_users=16, warmup_steps=2, checks=2)
SMALL = HSTUConfig(dimensions=8, n_layers=1)


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


def prefixes(log: InteractionLog) -> tuple[list[tuple[int, int]], Observations]:
    """(row, step) of every event, and the contexts before them as an agent would be shown them."""
    whole = log.sequences()
    events = [(row, step) for row, length in enumerate(whole.length) for step in range(length)]
    rows, steps = np.array(events).T
    past = np.arange(whole.titles.shape[1]) < steps[:, None]
    observations = Observations(
        titles=np.where(past, whole.titles[rows], log.n_titles),
        scores=np.where(past, whole.scores[rows], np.float32(0)),
        times=np.where(past, whole.times[rows], np.float32(0)),
        length=steps,
        epoch=whole.epoch[rows],
        n_titles=log.n_titles,
    )
    return events, observations


def weights(ensemble: RewardEnsemble) -> list[Tensor]:
    return [value.clone() for member in ensemble.members for value in member.state_dict().values()]


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    """Histories of one to five events over 12 titles, the later ones better."""
    rng = np.random.default_rng(0)
    users = [
        [(int(title), 1 + title / 4 + rng.uniform()) for title in rng.permutation(12)[: rng.integers(1, 6)]]
        for _ in range(40)
    ]
    return log_of(users, 12)


@pytest.fixture(scope="module")
def backbone(log: InteractionLog) -> Backbone:
    return pretrain(log, SMALL, SHORT)


@pytest.fixture(scope="module")
def ensemble(log: InteractionLog, backbone: HSTU) -> RewardEnsemble:
    return fit_reward_ensemble(log, backbone, RewardEnsembleConfig(training=SHORT))


@pytest.fixture(scope="module")
def forms(log: InteractionLog, backbone: HSTU, ensemble: RewardEnsemble) -> dict[str, RewardEnsemble]:
    """An ensemble of each form."""
    appended = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(form="appended", training=SHORT))
    return {"shallow": ensemble, "appended": appended}


# -- errors ----------------------------------------------------------------------------------------------------------


def test_squared_error_by_hand(backbone: HSTU) -> None:
    """An untrained head that says 3: errors of 1, −2 and ½ give (1 + 4 + ¼)/3; padding has no part in it."""
    batch = next(Histories(log_of([[(0, 4.0), (1, 1.0)], [(5, 3.5)]], 12)).chunks())
    scorer = Scorer(backbone, 3.0)
    with torch.no_grad():
        scorer.head.mix.zero_()
        error = squared_error(scorer.at(batch, batch.titles), batch)
    assert error.item() == pytest.approx(5.25 / 3, abs=1e-5)


def test_the_ensembles_error_is_that_of_its_mean(backbone: HSTU) -> None:
    """Members that say 3 and 5 on scores of 4 and 1: the mean is right once and 3 off once, 9/2."""
    members = [Scorer(backbone, 3.0), Scorer(backbone, 5.0)]
    for member in members:
        torch.nn.init.zeros_(member.head.mix)
    histories = Histories(log_of([[(0, 4.0), (1, 1.0)]], 12))
    assert mean_squared_error(members, histories) == pytest.approx(4.5, abs=1e-5)


# -- predictions -----------------------------------------------------------------------------------------------------


def test_predictions_are_finite_for_seen_titles_and_empty_histories(ensemble: RewardEnsemble) -> None:
    nobody = Observations(
        titles=np.full((2, 3), 12),
        scores=np.zeros((2, 3), dtype=np.float32),
        times=np.zeros((2, 3), dtype=np.float32),
        length=np.zeros(2, dtype=np.int64),
        epoch=np.zeros(2, dtype=np.int64),
        n_titles=12,
    )
    mean, deviation = ensemble.predict(nobody)
    assert mean.shape == deviation.shape == (2, 12)
    assert np.isfinite(mean).all()
    assert (deviation > 0).all()
    np.testing.assert_array_equal(ensemble.mean(nobody), mean)


@pytest.mark.parametrize("form", FORMS)
def test_the_ensemble_is_its_members(form: str, log: InteractionLog, forms: dict[str, RewardEnsemble]) -> None:
    """Mean and deviation with M − 1 degrees of freedom, at every prefix, by whichever way they are asked for."""
    ensemble = forms[form]
    events, observations = prefixes(log)
    each = np.stack([member(*tensors(observations)).numpy() for member in ensemble.members])
    mean, deviation = ensemble.predict(observations, chunk=7)
    np.testing.assert_allclose(mean, each.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(deviation, each.std(axis=0, ddof=1), atol=1e-5)
    np.testing.assert_array_equal(ensemble.mean(observations), ensemble.predict(observations).mean)
    whole = log.sequences()
    forced = np.random.default_rng(0).integers(12, size=whole.titles.shape)
    logged, other = ensemble.at(log), ensemble.at(Histories(log), forced)
    np.testing.assert_array_equal(ensemble.mean_at(log), logged.mean)
    for index, (row, step) in enumerate(events):
        for found, title in ((logged, whole.titles[row, step]), (other, forced[row, step])):
            assert found.mean[row, step] == pytest.approx(mean[index, title], abs=1e-4)
            assert found.deviation[row, step] == pytest.approx(deviation[index, title], abs=1e-4)


def test_no_contexts_have_no_predictions(forms: dict[str, RewardEnsemble], log: InteractionLog) -> None:
    nothing = log.sequences()[slice(0, 0)]
    for ensemble in forms.values():
        assert ensemble.mean(nothing).shape == (0, 12)


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_validation_users_calibrate(form: str, log: InteractionLog, backbone: Backbone) -> None:
    held_out = log_of([[(0, 4.0), (1, 1.0)], [(5, 3.5)], [(7, 2.0), (2, 5.0), (3, 1.5)]], 12)
    ensemble = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(form=form, members=2, training=SHORT), held_out)
    known, own = ensemble.calibration, ensemble.at(held_out)
    assert known is not None
    assert known.user.tolist() == [0, 0, 1, 2, 2, 2]
    valid = Histories(held_out).valid.numpy()
    np.testing.assert_allclose(known.residual, held_out.score - own.mean[valid], atol=1e-6)
    np.testing.assert_allclose(known.deviation, own.deviation[valid], atol=1e-6)
    residual = (log.sequences().scores - ensemble.mean_at(log))[Histories(log).valid.numpy()]
    assert known.noise == pytest.approx(float(np.sqrt(np.mean(residual**2))), rel=1e-5)
    assert known.bounds == (1.0, 5.0)


def test_intervals_are_about_the_prediction(ensemble: RewardEnsemble, log: InteractionLog) -> None:
    observations = log.sequences()
    mean, deviation = ensemble.predict(observations)
    low, high = ensemble.interval(observations, 0.5, of="mean")
    half = stats.t.ppf(0.75, 2) * np.sqrt(4 / 3) * deviation
    np.testing.assert_allclose(low, mean - half, atol=1e-5)
    np.testing.assert_allclose(high, mean + half, atol=1e-5)
    assert ensemble.calibration is not None
    low, high = ensemble.interval(observations, 0.5)
    half = ensemble.calibration.quantile(0.5) * np.sqrt(ensemble.calibration.noise**2 + deviation**2)
    np.testing.assert_allclose(low, np.clip(mean - half, 1, 5), atol=1e-5)
    np.testing.assert_allclose(high, np.clip(mean + half, 1, 5), atol=1e-5)
    wide = ensemble.interval(observations, 0.75)
    assert (wide.low <= low).all()
    assert (wide.high >= high).all()


def test_other_users_calibrate_in_place_of_the_validation_users(log: InteractionLog, backbone: Backbone) -> None:
    ensemble = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=SHORT))
    assert ensemble.calibration is not None
    before = ensemble.calibration
    assert ensemble.calibrate(replace(log, bounded_scores=False)) is ensemble
    assert len(ensemble.calibration.residual) == len(log) > len(before.residual)
    assert ensemble.calibration.noise == before.noise
    assert ensemble.calibration.bounds is None


def test_intervals_that_cannot_be_given_are_refused(ensemble: RewardEnsemble, log: InteractionLog) -> None:
    observations = log.sequences()
    with pytest.raises(ConfigError, match="no interval of 'reward'; there are score, mean"):
        ensemble.interval(observations, of="reward")
    with pytest.raises(ConfigError, match=r"level .* got 90"):
        ensemble.interval(observations, level=90)
    bare = RewardEnsemble(ensemble.members, ensemble.records)
    bare.interval(observations, of="mean")
    with pytest.raises(ConfigError, match="not calibrated"):
        bare.interval(observations)
    with pytest.raises(ConfigError, match="needs the noise"):
        bare.calibrate(log)


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_loaded(
    form: str, forms: dict[str, RewardEnsemble], log: InteractionLog, tmp_path: Path
) -> None:
    ensemble, observations = forms[form], log.sequences()
    ensemble.save(tmp_path / "rewards")
    assert sorted(os.listdir(tmp_path / "rewards")) == ["rewards.json", "rewards.safetensors"]
    loaded = load_reward_ensemble(tmp_path / "rewards")
    assert loaded.form == form
    assert [type(member) for member in loaded.members] == [type(member) for member in ensemble.members]
    assert all(torch.equal(a, b) for a, b in zip(weights(loaded), weights(ensemble), strict=True))
    assert not any(member.training for member in loaded.members)
    assert loaded.records == ensemble.records
    for got, expected in zip(loaded.predict(observations), ensemble.predict(observations), strict=True):
        np.testing.assert_array_equal(got, expected)
    for of in ("score", "mean"):
        again, before = (model.interval(observations, 0.8, of) for model in (loaded, ensemble))
        np.testing.assert_array_equal(again, before)
    assert table_key(loaded.members, log) == table_key(ensemble.members, log)


def test_an_ensemble_without_calibration_or_record_is_loaded_as_it_is(ensemble: RewardEnsemble, tmp_path: Path) -> None:
    RewardEnsemble(ensemble.members, [TrainingRecord(0)]).save(tmp_path)
    loaded = load_reward_ensemble(tmp_path)
    assert loaded.calibration is None
    assert loaded.records == [TrainingRecord(0)]


def test_metadata_are_saved_with_it(tmp_path: Path) -> None:
    world = World(WorldConfig(n_titles=20, n_genres=3, history_length=4, cold_share=0.3))
    log = world.generate_log(40)
    backbone = pretrain(log, SMALL, SHORT)
    assert backbone.metadata is not None
    ensemble = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=SHORT))
    ensemble.save(tmp_path)
    observations = log.sequences()
    np.testing.assert_array_equal(load_reward_ensemble(tmp_path).mean(observations), ensemble.mean(observations))


def test_damaged_files_are_a_named_error(ensemble: RewardEnsemble, tmp_path: Path) -> None:
    ensemble.save(tmp_path)
    about = json.loads((tmp_path / "rewards.json").read_text())
    tensors_of = (tmp_path / "rewards.safetensors").read_bytes()
    changed: list[dict[str, Any]] = [
        {"form": "deep"},
        {"members": 7},
        {"members": "many"},
        {"backbone": {**about["backbone"], "n_titles": 13}},
        {"backbone": {**about["backbone"], "kind": "none"}},
        {"records": [{}]},
        {"calibration": {"noise": None, "bounds": None}},
    ]
    for change in changed:
        (tmp_path / "rewards.json").write_text(json.dumps(about | change))
        with pytest.raises(CheckpointError, match="holds no reward ensemble"):
            load_reward_ensemble(tmp_path)
    for text in ("", "[]", "{"):
        (tmp_path / "rewards.json").write_text(text)
        with pytest.raises(CheckpointError, match="holds no reward ensemble"):
            load_reward_ensemble(tmp_path)
    (tmp_path / "rewards.json").write_text(json.dumps(about))
    flipped = bytearray(tensors_of)
    flipped[-5] ^= 1
    for damaged in (tensors_of[:-8], bytes(flipped), b""):
        (tmp_path / "rewards.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"sha256 of rewards\.safetensors is not"):
            load_reward_ensemble(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        load_reward_ensemble(tmp_path / "nowhere")


# -- fitting ------------------------------------------------------------------------------------------------------


def test_it_understands_a_world_without_noise() -> None:
    """Satisfaction is written on the score, and turns on taste: no baseline can know it."""
    world = World(WorldConfig(n_titles=30, history_length=8, taste_dimensions=2, n_genres=4, reward_noise=0.0))
    log, held_out = world.generate_log(500), world.generate_log(150, split="validation")
    steps = TrainingConfig(steps=150, batch_users=32, learning_rate=1e-2, warmup_steps=10, checks=3)
    backbone = pretrain(log, HSTUConfig(dimensions=16), steps, held_out)
    fitted = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=steps), held_out)
    histories = Histories(held_out)
    valid = histories.valid.numpy()
    guesses = [baseline.fit(log).mean_at(histories)[valid] for baseline in BASELINES]
    errors = [float(((guess - held_out.score) ** 2).mean()) for guess in guesses]
    own = mean_squared_error(fitted.members, histories)
    assert own < 0.6 * min(errors[:2])  # the study's two
    assert own < errors[2]  # the two together
    # and it knows titles that were not shown: predictions order them by their true satisfaction
    contexts = world.contexts(200)
    truth = world.satisfaction(contexts.users)
    predicted = fitted.mean(contexts.observations)
    centred = (
        (truth - truth.mean(axis=1, keepdims=True)).ravel(),
        (predicted - predicted.mean(axis=1, keepdims=True)).ravel(),
    )
    assert np.corrcoef(*centred)[0, 1] > 0.5


def test_members_differ_in_every_part(ensemble: RewardEnsemble) -> None:
    one, two, three = (member.state_dict() for member in ensemble.members)
    for name in one:
        if name != "head.mean":  # all start from the log's
            assert not torch.equal(one[name], two[name])
            assert not torch.equal(two[name], three[name])


def test_members_start_apart_and_see_other_users_in_other_batches(
    log: InteractionLog, backbone: HSTU, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[Tensor] = []
    purposes: list[str] = []
    drawn: list[list[int]] = []

    def noting(
        member: Any, loss: Any, objective: Any, histories: HistorySource, *further: Any, **options: Any
    ) -> TrainingRecord:
        heads.append(member.head.mix.detach().clone())
        purposes.append(further[2])
        drawn.append([int(row) for batch in histories.chunks() for row in batch.rows])
        return TrainingRecord(0)

    monkeypatch.setattr("recsim_gr.rewards.train", noting)
    fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=3, training=SHORT))
    assert not torch.equal(heads[0], heads[1])
    assert len(set(purposes)) == 3  # which name the stream of the batches
    assert drawn[0] != drawn[1] != drawn[2]
    assert all(len(rows) == 36 and len(set(rows)) < 30 for rows in drawn)  # of 36 users, with replacement


def test_equal_seeds_give_equal_ensembles_and_leave_the_global_state(log: InteractionLog, backbone: HSTU) -> None:
    config = RewardEnsembleConfig(members=2, training=SHORT)
    torch.manual_seed(9)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    one = weights(fit_reward_ensemble(log, backbone, config, seed=1))
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(), before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.rand(3)
    again = weights(fit_reward_ensemble(log, backbone, config, seed=1))
    other = weights(fit_reward_ensemble(log, backbone, config, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert sum(not torch.equal(a, b) for a, b in zip(one, other, strict=True)) >= len(one) - 2


@pytest.mark.parametrize("form", FORMS)
def test_a_member_whose_loss_ends_above_its_start_is_an_error(form: str, log: InteractionLog, backbone: HSTU) -> None:
    schedule = TrainingConfig(steps=40, batch_users=16, warmup_steps=2, checks=2, learning_rate=300.0)
    config = RewardEnsembleConfig(members=2, form=form, training=schedule)
    with pytest.raises(TrainingError, match=r"reward member 0 diverged.*lower its learning rate"):
        fit_reward_ensemble(log, backbone, config)
    sane = replace(schedule, learning_rate=1e-3)
    fit_reward_ensemble(log, backbone, replace(config, training=sane))


def test_fitting_changes_no_backbone(log: InteractionLog, backbone: HSTU) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    flags = [parameter.requires_grad for parameter in backbone.parameters()], backbone.training
    ensemble = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=SHORT))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert ([parameter.requires_grad for parameter in backbone.parameters()], backbone.training) == flags
    assert not torch.equal(ensemble.members[0].backbone.titles, backbone.titles)  # co-trained, in a copy
    assert not any(p.requires_grad for member in ensemble.members for p in member.parameters())


def test_fitting_reports_the_checks_of_all_members(log: InteractionLog, backbone: HSTU) -> None:
    told: list[int] = []
    config = RewardEnsembleConfig(members=2, training=SHORT)
    ensemble = fit_reward_ensemble(log, backbone, config, after_check=lambda step, _: told.append(step))
    assert told == [5, 10, 15, 20]
    assert [record.steps for record in ensemble.records] == [10, 10]


def test_imitation_can_be_left_out(log: InteractionLog, backbone: HSTU) -> None:
    with_it = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=SHORT))
    config = RewardEnsembleConfig(members=2, imitation_weight=0.0, training=SHORT)
    without = fit_reward_ensemble(log, backbone, config)
    assert not torch.equal(with_it.members[0].backbone.titles, without.members[0].backbone.titles)
    assert without.records[0].best_objective < without.records[0].objectives[0][1]


@pytest.mark.parametrize(
    ("field", "value"), [("members", 1), ("imitation_weight", -0.1), ("head_rate", 0.0), ("head_rate", math.nan)]
)
def test_a_bad_config_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"RewardEnsembleConfig\.{field} must be"):
        RewardEnsembleConfig(**{field: value})


def test_logs_that_do_not_fit_are_refused(log: InteractionLog, backbone: HSTU) -> None:
    with pytest.raises(ConfigError, match="more users"):
        fit_reward_ensemble(log_of([[(0, 1.0)]], 12), backbone)
    with pytest.raises(ConfigError, match="one world"):
        fit_reward_ensemble(log, backbone, validation=log_of([[(0, 1.0)]], 3))
    with pytest.raises(ConfigError, match="the log has 7 titles and the HSTU 12"):
        fit_reward_ensemble(log_of([[(0, 1.0)], [(1, 1.0)]], 7), backbone, RewardEnsembleConfig(training=SHORT))
