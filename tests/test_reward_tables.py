"""Tables of r̂ on every prefix of a log: what the ensemble says, in memory and by memory map, whole or not at all."""

import gc
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from recsim_gr import agents, generation, reward_tables
from recsim_gr.agents.base import Problem
from recsim_gr.backbones import Backbone, HSTUConfig
from recsim_gr.errors import CheckpointError, ConfigError, RunDirectoryError
from recsim_gr.generation import Plan, generate
from recsim_gr.histories import HistorySource
from recsim_gr.log import AnyLog, InteractionLog, ShardedLog
from recsim_gr.observations import Observations
from recsim_gr.pretraining import pretrain
from recsim_gr.reward_heads import FORMS
from recsim_gr.reward_tables import FactoredTable, RewardTable, table_key
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import WorldConfig

SHORT = TrainingConfig(steps=8, batch_users=16, learning_rate=1e-2, warmup_steps=2, checks=2)
SMALL = HSTUConfig(dimensions=8, n_layers=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardedLog:
    """60 users over 12 titles with one to five events, in a dozen parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PART_EVENTS", 30)
        world = WorldConfig(n_titles=12, n_genres=3, history_length=5, history_median=3, seed=5)
        return generate(
            Plan(world=world, n_users=60, users_per_shard=25, propensities=True), tmp_path_factory.mktemp("log")
        )


@pytest.fixture(scope="module")
def log(shards: ShardedLog) -> InteractionLog:
    return shards.read()


@pytest.fixture(scope="module")
def backbone(log: InteractionLog) -> Backbone:
    return pretrain(log, SMALL, SHORT)


@pytest.fixture(scope="module")
def ensembles(log: InteractionLog, backbone: Backbone) -> dict[str, RewardEnsemble]:
    return {form: fit_reward_ensemble(log, backbone, RewardEnsembleConfig(form=form, training=SHORT)) for form in FORMS}


@pytest.fixture(params=list(FORMS))
def ensemble(request: pytest.FixtureRequest, ensembles: dict[str, RewardEnsemble]) -> RewardEnsemble:
    """One of either form, which has no table yet."""
    fitted = ensembles[request.param]
    return RewardEnsemble(fitted.members, fitted.records, fitted.calibration)


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


def assert_same(one: RewardTable, other: RewardTable, users: int) -> None:
    every = torch.arange(users)
    torch.testing.assert_close(one.mean(every), other.mean(every), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.deviation(every), other.deviation(every), atol=1e-5, rtol=0)


def only_table(directory: Path) -> Path:
    (place,) = directory.iterdir()
    return place


# -- in memory --------------------------------------------------------------------------------------------------------


def test_tables_say_what_the_ensemble_says(log: InteractionLog, ensemble: RewardEnsemble) -> None:
    table = ensemble.on(log)
    events, observations = prefixes(log)
    predicted = ensemble.predict(observations, chunk=7)
    every = torch.arange(log.n_users)
    mean, deviation = table.mean(every), table.deviation(every)
    drawn = np.random.default_rng(0).integers(12, size=(*mean.shape[:2], 4))
    some = table.spread(every, torch.from_numpy(drawn))
    for index, (row, step) in enumerate(events):
        np.testing.assert_allclose(mean[row, step].numpy(), predicted.mean[index], atol=1e-4)
        np.testing.assert_allclose(deviation[row, step].numpy(), predicted.deviation[index], atol=1e-4)
        for got, expected in zip(some, predicted, strict=True):
            np.testing.assert_allclose(got[row, step].numpy(), expected[index][drawn[row, step]], atol=1e-4)
    rows, steps = np.array(events).T
    for shift in range(3):
        titles = (rows + 5 * steps + shift) % 12
        answered = table.at(rows, steps, titles)
        assert answered.dtype == np.float32
        np.testing.assert_allclose(answered, predicted.mean[np.arange(len(events)), titles], atol=1e-4)


def test_members_of_a_factored_table_are_the_members(log: InteractionLog, ensembles: dict[str, RewardEnsemble]) -> None:
    ensemble = ensembles["shallow"]
    table = ensemble.on(log)
    assert isinstance(table, FactoredTable)
    batch = next(ensemble.members[0].batches(reward_tables.histories_of(log)))
    every = table.members(torch.arange(log.n_users))
    titles = batch.titles.clamp(max=11)
    for member, own in zip(ensemble.members, every, strict=True):
        expected = member.at(batch, titles)
        got = own.gather(-1, titles.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(got[batch.valid], expected[batch.valid], atol=1e-5, rtol=0)


def test_tables_answer_for_any_rows_in_any_order(log: InteractionLog, ensemble: RewardEnsemble) -> None:
    table = ensemble.on(log)
    every, some = torch.arange(log.n_users), torch.tensor([7, 2, 2, 31])
    torch.testing.assert_close(table.mean(some), table.mean(every)[some])
    torch.testing.assert_close(table.deviation(some), table.deviation(every)[some])


def test_a_table_is_made_once_a_log_and_goes_with_it(log: InteractionLog, ensemble: RewardEnsemble) -> None:
    assert ensemble.on(log) is ensemble.on(log)
    other = log.rows(slice(0, len(log)))
    assert ensemble.on(other) is not ensemble.on(log)
    table = weakref.ref(ensemble.on(other))
    del other
    gc.collect()
    assert table() is None


def test_a_table_too_large_for_memory_is_refused(
    log: InteractionLog, ensemble: RewardEnsemble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = ensemble.on(log)
    size = sum(getattr(table, name).numel() * 4 for name in table.arrays if name not in ("vectors", "biases"))
    other = log.rows(slice(0, len(log)))
    monkeypatch.setattr(reward_tables, "MOST_BYTES", size - 1)
    with pytest.raises(ConfigError, match=r"on\(log, directory\)"):
        ensemble.on(other)
    assert_same(ensemble.on(other, tmp_path), table, log.n_users)
    monkeypatch.setattr(reward_tables, "MOST_BYTES", size)
    ensemble.on(other)


def test_a_log_in_shards_needs_a_directory(shards: ShardedLog, ensemble: RewardEnsemble) -> None:
    with pytest.raises(ConfigError, match=r"on\(log, directory\).* or read\(\) the log"):
        ensemble.on(shards)


# -- by memory map ----------------------------------------------------------------------------------------------------


def test_a_table_on_disk_is_the_one_in_memory(
    log: InteractionLog, shards: ShardedLog, ensemble: RewardEnsemble, tmp_path: Path
) -> None:
    in_memory = ensemble.on(log)
    on_disk = ensemble.on(log, tmp_path)
    assert type(on_disk) is type(in_memory)
    assert_same(on_disk, in_memory, log.n_users)
    assert ensemble.on(log, tmp_path) is on_disk
    assert ensemble.on(log) is in_memory
    place = only_table(tmp_path)
    assert {path.name for path in place.iterdir()} == {"table.json", *(f"{name}.npy" for name in on_disk.arrays)}
    sharded = ensemble.on(shards, tmp_path)  # the same content: the same table
    assert only_table(tmp_path) == place
    assert_same(sharded, in_memory, log.n_users)


def test_shards_make_the_same_table_a_part_at_a_time(
    log: InteractionLog, shards: ShardedLog, ensemble: RewardEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardedLog, "read", lambda self: pytest.fail("the whole log was read"))
    ensemble.tables_in = tmp_path
    assert_same(ensemble.on(shards), ensemble.on(log), log.n_users)
    some = ensemble.on(shards.users(10, 31))
    every = torch.arange(21)
    torch.testing.assert_close(some.mean(every), ensemble.on(log).mean(every + 10), atol=1e-5, rtol=0)


def test_it_is_a_memory_map_that_cannot_change_the_file(
    log: InteractionLog,
    ensemble: RewardEnsemble,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, loaded = np.load, []

    def noting(path: Path, **options: Any) -> Any:
        assert options["allow_pickle"] is False
        loaded.append(load(path, **options))
        return loaded[-1]

    monkeypatch.setattr(np, "load", noting)
    table = ensemble.on(log, tmp_path)
    assert len(loaded) == len(table.arrays)
    assert all(isinstance(array, np.memmap) for array in loaded)
    files = {path: path.read_bytes() for path in only_table(tmp_path).iterdir()}
    array = getattr(table, table.arrays[0])
    assert array.data_ptr() == loaded[0].ctypes.data  # not a copy
    array += 1.0
    assert {path: path.read_bytes() for path in files} == files
    assert not recwarn.list


def test_another_ensemble_or_another_log_is_another_table(
    log: InteractionLog, ensembles: dict[str, RewardEnsemble]
) -> None:
    members = ensembles["shallow"].members
    keys = {table_key(members, log), table_key(members[:2], log), table_key(ensembles["appended"].members, log)}
    scores, hours, titles = log.score.copy(), log.hours.copy(), log.title.copy()
    scores[3] = 1.0 if scores[3] != 1.0 else 2.0
    hours[-1] += 1.0
    second = int(np.flatnonzero(log.step == 1)[0])
    titles[[second - 1, second]] = titles[[second, second - 1]]
    others = [replace(log, score=scores), replace(log, hours=hours), replace(log, title=titles)]
    last_user = int(np.flatnonzero(log.step == 0)[-1])
    others.append(log.rows(slice(0, last_user)))
    keys |= {table_key(members, other) for other in others}
    with torch.no_grad():
        members[0].head.title[5] += 1e-6  # type: ignore[operator, index]
    keys.add(table_key(members, log))
    assert len(keys) == 8


def test_what_is_there_is_not_made_again(
    log: InteractionLog, ensemble: RewardEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ensemble.on(log, tmp_path)
    again = RewardEnsemble(ensemble.members, ensemble.records)
    monkeypatch.setattr(type(table), "rows", classmethod(lambda *_: pytest.fail("it was made again")))
    assert_same(again.on(log, tmp_path), table, log.n_users)


def test_of_two_that_race_one_wins_and_both_read_a_whole_table(
    log: InteractionLog, ensemble: RewardEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find nothing there, both write, and the second to be done finds the first one's table in its place."""
    kind, met = type(ensemble.on(log)), threading.Barrier(2, timeout=30)
    common = kind.common

    def waiting(members: Any) -> Any:
        met.wait()
        return common(members)

    monkeypatch.setattr(kind, "common", staticmethod(waiting))
    tables: list[RewardTable] = []

    def work() -> None:
        tables.append(RewardEnsemble(ensemble.members, ensemble.records).on(log, tmp_path))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables) == 2
    for table in tables:
        assert_same(table, ensemble.on(log), log.n_users)
    assert [path.name for path in tmp_path.iterdir()] == [table_key(ensemble.members, log)]


def test_what_is_interrupted_leaves_nothing(
    log: InteractionLog, ensemble: RewardEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def stopping(*_: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(type(ensemble.on(log)), "rows", stopping)
        with pytest.raises(Stopped):
            ensemble.on(log, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert_same(ensemble.on(log, tmp_path), ensemble.on(log), log.n_users)


def test_damage_is_a_named_error(log: InteractionLog, ensemble: RewardEnsemble, tmp_path: Path) -> None:
    name = f"{ensemble.on(log, tmp_path).arrays[0]}.npy"
    path = only_table(tmp_path) / name
    content = path.read_bytes()

    def fresh(verify: bool = True) -> RewardTable:
        return RewardEnsemble(ensemble.members, ensemble.records).on(log, tmp_path, verify)

    for damaged in (content[:40], content[:-4], content + b"more", b"", b"\x80\x04" + content[2:]):
        path.write_bytes(damaged)
        if damaged.startswith(content):
            fresh()  # bytes behind the array are nobody's
            continue
        with pytest.raises(CheckpointError, match="remove it, and it is made again"):
            fresh(verify=False)
    flipped = bytearray(content)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=f"sha256 of {name} is not"):
        fresh()
    fresh(verify=False)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        fresh()
    path.write_bytes(content)
    index = path.parent / "table.json"
    for text in ("{", "[]", '{"format": 2, "kind": "DenseTable", "files": {}}', '{"format": 1}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="holds no table"):
            fresh()


def test_an_array_of_objects_is_never_loaded(log: InteractionLog, ensemble: RewardEnsemble, tmp_path: Path) -> None:
    path = only_table_file(ensemble, log, tmp_path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match="holds no table"):
        RewardEnsemble(ensemble.members, ensemble.records).on(log, tmp_path)


def only_table_file(ensemble: RewardEnsemble, log: InteractionLog, directory: Path) -> Path:
    """The file of the first array of a table that is made for it."""
    name = ensemble.on(log, directory).arrays[0]
    return only_table(directory) / f"{name}.npy"


def test_a_directory_that_cannot_be_written_is_a_named_error(
    log: InteractionLog, ensemble: RewardEnsemble, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        ensemble.on(log, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


# -- agents -----------------------------------------------------------------------------------------------------------


def test_the_environment_pays_the_mean_of_either_form(log: InteractionLog, ensemble: RewardEnsemble) -> None:
    envs: Any = gymnasium.make_vec("recsim_gr/RewardModel-v0", num_envs=40, rewards=ensemble, log=log)
    observations, _ = envs.reset(seed=0)
    titles = np.arange(40) % 12
    _, rewards, _, _, infos = envs.step(titles)
    expected = ensemble.mean(Observations(**observations, n_titles=12))[np.arange(40), titles]
    valid = ~infos["final_info"]["invalid"]
    assert 10 < valid.sum() < 40
    np.testing.assert_allclose(rewards[valid], expected[valid], atol=1e-4)


@pytest.mark.parametrize("name", sorted(name for name, kind in agents.AGENTS.items() if kind.needs_ensemble))
def test_agents_learn_from_the_appended_form(
    name: str, log: InteractionLog, backbone: Backbone, ensembles: dict[str, RewardEnsemble]
) -> None:
    small: dict[str, dict[str, Any]] = {
        "PPO": {"rollout": 64, "n_envs": 16, "minibatch": 32},
        "RSDPO": {"interval": 0.0},  # so little training is sure of no pair
        "RSIPO": {"interval": 0.0},
    }
    options = small.get(name, {})
    told: list[float] = []
    agent = agents.AGENTS[name](training=SHORT, **options)
    agent.fit(log, backbone, ensembles["appended"], after_check=lambda _, objective: told.append(objective))
    assert np.isfinite(told).all()
    assert len(set(told)) > 1
    found = np.exp(agent.log_probs(log.sequences()))
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-4)


# -- agents on a log in shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ASFT", "RSDPO"])
def test_agents_learn_from_shards_through_tables_on_disk(
    name: str,
    log: InteractionLog,
    shards: ShardedLog,
    backbone: Backbone,
    ensemble: RewardEnsemble,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they work out once a log is the same as in memory, row by row; then they learn."""
    kind, problems = agents.AGENTS[name], []
    made = kind.problem  # type: ignore[attr-defined]

    def noting(self: Any, histories: HistorySource, given: AnyLog, parts: Any) -> Problem:
        problems.append(made(self, histories, given, parts))
        return problems[-1]

    monkeypatch.setattr(kind, "problem", noting)
    in_memory = kind(training=SHORT).fit(log, backbone, ensemble)
    ensemble.tables_in = tmp_path
    monkeypatch.setattr(ShardedLog, "read", lambda self: pytest.fail("the whole log was read"))
    from_shards = kind(training=SHORT).fit(shards, backbone, ensemble)
    assert len(list(tmp_path.iterdir())) == 2  # training and validation users
    assert in_memory.record.gradient_steps == from_shards.record.gradient_steps == 8
    for memory, disk in zip(problems[:2], problems[2:], strict=True):
        for key, value in memory.extra.items():
            found = disk.extra[key][:, : value.shape[1]]  # parts are as wide as the longest history of the whole log
            assert found.shape == value.shape
            if name == "ASFT":  # RSDPO draws its candidates chunk by chunk, and chunks end with parts
                torch.testing.assert_close(found, value, atol=1e-4, rtol=0)


def test_ppo_says_that_it_needs_the_log_in_memory(
    shards: ShardedLog, backbone: Backbone, ensemble: RewardEnsemble, tmp_path: Path
) -> None:
    ensemble.tables_in = tmp_path
    with pytest.raises(ConfigError, match=r"read\(\) it first"):
        agents.PPO(training=SHORT).fit(shards, backbone, ensemble)
