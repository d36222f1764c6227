"""Training from a log in shards: every user once an epoch, few parts in memory, the same run twice."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsim_gr import agents, generation
from recsim_gr.backbones import HSTU, Backbone, HSTUConfig
from recsim_gr.errors import ConfigError
from recsim_gr.generation import Plan, generate
from recsim_gr.histories import WINDOW_PARTS, Batch, Histories, ShardedHistories, histories_of, split_logs
from recsim_gr.log import InteractionLog, ShardedLog
from recsim_gr.prefixes import negative_log_likelihood
from recsim_gr.pretraining import pretrain, pretrain_with_record
from recsim_gr.randomness import generator
from recsim_gr.rewards import RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import WorldConfig

SHORT = TrainingConfig(steps=12, batch_users=8, learning_rate=1e-2, warmup_steps=2, checks=3)
TINY = HSTUConfig(dimensions=8, n_layers=1)
WORLD = WorldConfig(n_titles=25, history_length=6, history_median=4, cold_share=0.2, reward_noise=0.0, seed=5)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ShardedLog:
    """200 users with histories of different lengths, some titles not out yet, in 20 parts of 10 users or fewer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PART_EVENTS", 60)
        plan = Plan(world=WORLD, n_users=200, users_per_shard=30, propensities=True)
        return generate(plan, tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def backbone(log: ShardedLog) -> Backbone:
    return pretrain(log, TINY, SHORT)


def assert_same_batch(one: Batch, other: Batch) -> None:
    for name in Batch._fields:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a, b), name


def state_of(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value.tolist() for name, value in module.state_dict().items()}


def test_chunks_are_those_of_the_log_in_memory(log: ShardedLog) -> None:
    whole, parts = Histories(log.read()), ShardedHistories(log)
    assert (len(parts), parts.longest, parts.n_titles) == (len(whole), whole.longest, whole.n_titles)
    assert parts.mean_score == pytest.approx(whole.mean_score, rel=1e-6)
    chunks = list(parts.chunks(7))
    assert all(len(chunk.rows) <= 7 for chunk in chunks)
    for chunk in chunks:
        assert_same_batch(chunk, whole.batch(chunk.rows))
        assert chunk.unreleased is not None
    assert torch.cat([chunk.rows for chunk in chunks]).tolist() == list(range(200))


@pytest.mark.parametrize("size", [1, 8, 64, 200, 500])
def test_every_user_comes_once_an_epoch(size: int, log: ShardedLog) -> None:
    histories, whole = ShardedHistories(log), Histories(log.read())
    batches = histories.batches(size, generator(0, "batches"))
    full = min(size, 200)
    epochs = []
    for _ in range(2):
        drawn = [next(batches) for _ in range(200 // full)]
        assert all(len(batch.rows) == full for batch in drawn)
        for batch in drawn:
            assert_same_batch(batch, whole.batch(batch.rows))
        rows = torch.cat([batch.rows for batch in drawn]).tolist()
        assert len(set(rows)) == len(rows) == 200 // full * full
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    again = histories.batches(size, generator(0, "batches"))
    assert [next(again).rows.tolist() for _ in range(200 // full)] == [
        epochs[0][start : start + full] for start in range(0, 200 // full * full, full)
    ]


def test_users_of_a_window_are_mixed(log: ShardedLog) -> None:
    """A batch of eight draws from several parts of a window of four, in no order, and epochs start elsewhere."""
    batches = ShardedHistories(log).batches(8, generator(1, "batches"))
    drawn = [next(batches).rows for _ in range(75)]  # three epochs
    parts = [len({int(row) // 10 for row in rows}) for rows in drawn]
    assert np.mean(parts) > 2.5
    assert sum(bool((rows.diff() > 0).all()) for rows in drawn) <= 1
    assert len({int(rows[0]) // 10 for rows in (drawn[0], drawn[25], drawn[50])}) > 1


def test_a_resample_draws_from_each_part_and_stays_the_same(log: ShardedLog) -> None:
    resampled = ShardedHistories(log).resampled(3, "resample 0")
    rows = torch.cat([chunk.rows for chunk in resampled.chunks()])
    starts = np.append(0, np.cumsum(log.part_users))
    for start, stop in pairwise(starts):
        assert ((rows[start:stop] >= start) & (rows[start:stop] < stop)).all()
    assert 0.55 < len(set(rows.tolist())) / 200 < 0.72  # 1 − 1/e of the users, as in any bootstrap
    batches = resampled.batches(20, generator(0, "batches"))
    drawn = torch.cat([next(batches).rows for _ in range(10)])
    assert sorted(drawn.tolist()) == sorted(rows.tolist())
    other = torch.cat([chunk.rows for chunk in ShardedHistories(log).resampled(3, "resample 1").chunks()])
    assert other.tolist() != rows.tolist()


def test_in_memory_a_resample_draws_from_all_users(log: ShardedLog) -> None:
    histories = Histories(log.read())
    drawn = torch.from_numpy(generator(3, "resample 0").integers(200, size=200))
    resampled = histories.resampled(3, "resample 0")
    assert (len(resampled), resampled.longest, resampled.n_titles) == (200, histories.longest, 25)
    assert torch.equal(torch.cat([chunk.rows for chunk in resampled.chunks(30)]), drawn)
    batch = histories.batch(drawn)
    assert resampled.mean_score == pytest.approx(float(batch.scores[batch.valid].mean()))
    own, batches = histories.batches(16, generator(0, "x")), resampled.batches(16, generator(0, "x"))
    for _ in range(15):
        assert_same_batch(next(batches), histories.batch(drawn[next(own).rows]))


def test_the_last_tenth_is_held_out(log: ShardedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = split_logs(log, None)
    memory_train, memory_held_out = split_logs(log.read(), None)
    for one, other in ((train, memory_train), (held_out, memory_held_out)):
        assert isinstance(one, ShardedLog)
        assert (one.n_users, len(one)) == (other.n_users, len(other))
        assert one.read().user.tolist() == other.user.tolist()
    monkeypatch.setattr("recsim_gr.histories.MOST_VALIDATION_USERS", 7)
    train, held_out = split_logs(log, None)
    assert (train.n_users, held_out.n_users) == (193, 7)
    with pytest.raises(ConfigError, match="a log of 1 users cannot be split"):
        split_logs(log.users(0, 1), None)


class Spy:
    """Counts how many of the things that a function returns are alive at once."""

    def __init__(self, function: Callable[..., Any], token: Callable[[Any], object]) -> None:
        self.function, self.token = function, token
        self.alive = self.most = self.calls = 0

    def as_method(self) -> Callable[..., Any]:
        """What takes the function's place in its class."""

        def counted(*arguments: Any) -> Any:
            result = self.function(*arguments)
            self.calls += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(self.token(result), self._gone)
            return result

        return counted

    def _gone(self) -> None:
        self.alive -= 1


def test_few_parts_are_in_memory_while_it_trains(log: ShardedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def titles(loaded: Any) -> Tensor:
        return loaded.titles

    gc.collect()
    logs, loads = Spy(ShardedLog.part, lambda part: part), Spy(ShardedHistories._load, titles)
    monkeypatch.setattr(ShardedLog, "part", logs.as_method())
    monkeypatch.setattr(ShardedHistories, "_load", loads.as_method())
    monkeypatch.setattr(ShardedLog, "read", lambda self: pytest.fail("the whole log was read"))
    steps = TrainingConfig(steps=40, batch_users=8, checks=2)
    _, record = pretrain_with_record(log, TINY, steps)
    assert record.best_objective < record.objectives[0][1]  # it learns
    assert loads.calls > 30  # more than an epoch, and the checks
    assert loads.most <= WINDOW_PARTS + 1  # and one that is being held out
    assert logs.most <= 2


def test_training_is_the_same_twice(log: ShardedLog) -> None:
    one, other = pretrain(log, TINY, SHORT, seed=4), pretrain(log, TINY, SHORT, seed=4)
    assert state_of(one) == state_of(other)
    assert state_of(one) != state_of(pretrain(log, TINY, SHORT, seed=5))


def test_it_learns_what_it_learns_from_memory(log: ShardedLog) -> None:
    """Other batches, the same problem: objectives agree to a few hundredths of a nat, far closer than they fell."""
    steps = TrainingConfig(steps=80, batch_users=32, learning_rate=1e-2, warmup_steps=10, checks=4)
    _, disk = pretrain_with_record(log, TINY, steps)
    _, memory = pretrain_with_record(log.read(), TINY, steps)
    assert disk.objectives[0] == pytest.approx(memory.objectives[0], abs=1e-4)
    fallen = memory.objectives[0][1] - memory.best_objective
    assert fallen > 0.15
    assert abs(disk.best_objective - memory.best_objective) < 0.3 * fallen


def test_rewards_are_fitted_from_shards(log: ShardedLog, backbone: HSTU) -> None:
    longer = replace(
        SHORT, steps=48
    )  # after a dozen steps of eight users an objective is still mostly which users came
    config = RewardEnsembleConfig(members=2, training=longer)
    rewards = fit_reward_ensemble(log, backbone, config, seed=1)
    again = fit_reward_ensemble(log, backbone, config, seed=1)
    assert [state_of(member) for member in rewards.members] == [state_of(member) for member in again.members]
    assert state_of(rewards.members[0]) != state_of(rewards.members[1])
    in_memory = fit_reward_ensemble(log.read(), backbone, config, seed=1)
    for disk, memory in zip(rewards.records, in_memory.records, strict=True):
        assert disk.objectives[0] == pytest.approx(memory.objectives[0], rel=1e-5)  # the same users, and mean score
        assert [step for step, _ in disk.objectives] == [step for step, _ in memory.objectives]
        assert disk.objectives[-1][1] == pytest.approx(memory.objectives[-1][1], rel=0.2)
        assert disk.objectives[-1] != disk.objectives[0]
    with pytest.raises(ConfigError, match=r"keep it in, or read\(\) the log first"):
        rewards.on(log)


def test_agents_learn_from_shards_or_say_that_they_cannot(log: ShardedLog, backbone: HSTU) -> None:
    rewards = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=SHORT))
    learned, refused = set(), set()
    for name, kind in agents.AGENTS.items():
        if kind.referee or kind.informed:
            continue
        has_schedule = hasattr(kind.config_type(), "training")
        agent = kind(training=SHORT) if has_schedule else kind()
        try:
            agent.fit(log, backbone, rewards)
            learned.add(name)
        except ConfigError as error:
            assert "read()" in str(error)  # noqa: PT017
            refused.add(name)
    assert {"Random", "Popularity", "Pretrained", "BC", "RewardWeightedBC", "CQL", "IPS"} <= learned
    assert {"ASFT", "RSDPO", "PPO"} <= refused


def test_popularity_counts_the_same(log: ShardedLog) -> None:
    on_disk, in_memory = agents.Popularity().fit(log), agents.Popularity().fit(log.read())
    assert on_disk.log_counts.tolist() == in_memory.log_counts.tolist()


def test_a_validation_log_may_be_in_memory_or_on_disk(log: ShardedLog, backbone: HSTU) -> None:
    memory = log.users(180, 200).read()
    one = pretrain(log.users(0, 180), TINY, SHORT, validation=memory)
    two = pretrain(log.users(0, 180), TINY, SHORT, validation=log.users(180, 200))
    assert state_of(one) == state_of(two) == state_of(backbone)
    measured = negative_log_likelihood(one, histories_of(memory))
    assert measured == pytest.approx(negative_log_likelihood(two, histories_of(log.users(180, 200))), rel=1e-6)


def test_an_opened_directory_trains(log: ShardedLog) -> None:
    directory: Path = log._directory.path
    again = InteractionLog.open(directory)
    assert state_of(pretrain(again, TINY, SHORT)) == state_of(pretrain(log, TINY, SHORT))
