"""What every agent must be. It runs over everything registered: a new agent is tested by being registered."""

import copy
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_post_hook

from recsim_gr import configs, histories, metrics
from recsim_gr.agents import AGENTS, BC, PPO, Agent, BackboneAgent, InformedAgent, agent_type, load_agent, register
from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.errors import CheckpointError, ConfigError, PolicyError, RecsimError, UnknownNameError
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts, Observations
from recsim_gr.policy import log_probs_of, ranking_scores
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

Make = Callable[..., Agent]
Fitted = Callable[[str], Agent]


def trains(name: str) -> bool:
    return "training" in {field.name for field in fields(AGENTS[name].config_type)}


def continues_a_backbone(name: str) -> bool:
    return trains(name) or issubclass(AGENTS[name], BackboneAgent)


COMPETITORS = [name for name, kind in AGENTS.items() if not kind.referee]
REFEREES = [name for name, kind in AGENTS.items() if kind.referee]
BLIND = [name for name in COMPETITORS if not AGENTS[name].informed]
LEARNERS = [name for name in COMPETITORS if trains(name)]
ON_A_BACKBONE = [name for name in COMPETITORS if continues_a_backbone(name)]

every_agent = pytest.mark.parametrize("name", AGENTS)
every_competitor = pytest.mark.parametrize("name", COMPETITORS)
every_referee = pytest.mark.parametrize("name", REFEREES)
every_learner = pytest.mark.parametrize("name", LEARNERS)


def same(one: Agent, other: Agent, observations: Observations) -> bool:
    """Bit for bit the same probabilities and rankings."""
    return bool(
        np.array_equal(one.log_probs(observations), other.log_probs(observations))
        and np.array_equal(one.scores(observations), other.scores(observations))
    )


def assert_close(one: NDArray[Any], other: NDArray[Any]) -> None:
    np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other))
    finite = np.isfinite(one)
    np.testing.assert_allclose(one[finite], other[finite], atol=2e-5)


@contextmanager
def global_random_state_kept(seed: int) -> Iterator[None]:
    """Sets Python's, NumPy's and torch's global generators; the block must leave them there."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(), before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


# -- the registry -------------------------------------------------------------------------------------------------


@every_agent
def test_it_is_known_by_its_name(name: str) -> None:
    kind = agent_type(name)
    assert kind.name == name
    assert kind().config == kind.config_type()  # every option has a default
    assert kind.__doc__


def test_names_are_taken_once() -> None:
    class Other(BC):
        """Another agent of that name."""

    before = dict(AGENTS)
    with pytest.raises(ConfigError, match="already an agent 'BC'"):
        register(Other)
    assert before == AGENTS
    with pytest.raises(UnknownNameError, match=r"no agent 'Nobody'; there are .*ASFT"):
        agent_type("Nobody")


# -- answers ------------------------------------------------------------------------------------------------------


@every_competitor
def test_it_answers_with_a_policy_over_unseen_titles(name: str, fitted: Fitted, contexts: Contexts) -> None:
    observations = contexts.observations
    log_probs, scores, seen = (
        fitted(name).log_probs(observations),
        fitted(name).scores(observations),
        observations.seen(),
    )
    assert log_probs.dtype == np.float32
    assert log_probs.shape == scores.shape == (20, 30)
    assert np.isneginf(log_probs[seen]).all()
    assert np.isfinite(log_probs[~seen]).all()
    assert np.isfinite(scores[~seen]).all()
    np.testing.assert_allclose(np.exp(log_probs.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(fitted(name).log_probs(observations), log_probs)
    np.testing.assert_array_equal(fitted(name).scores(observations), scores)


@every_competitor
def test_an_answer_depends_on_its_own_context_only(name: str, fitted: Fitted, contexts: Contexts) -> None:
    """Not on the contexts beside it, and not on how far they are padded."""
    observations = contexts.observations
    together = fitted(name).log_probs(observations)
    apart = [fitted(name).log_probs(observations[slice(i, i + 1)]) for i in range(20)]
    assert_close(np.concatenate(apart), together)
    wide = Observations(
        np.pad(observations.titles, ((0, 0), (0, 3)), constant_values=30),
        np.pad(observations.scores, ((0, 0), (0, 3))),
        np.pad(observations.times, ((0, 0), (0, 3))),
        observations.length,
        observations.epoch,
        30,
    )
    assert_close(fitted(name).log_probs(wide), together)


@every_competitor
@pytest.mark.parametrize("width", [0, 2])
def test_it_answers_to_users_without_a_history(name: str, width: int, fitted: Fitted) -> None:
    nobody = Observations(
        np.full((2, width), 30),
        np.zeros((2, width), dtype=np.float32),
        np.zeros((2, width), dtype=np.float32),
        np.zeros(2, dtype=np.int64),
        np.zeros(2, dtype=np.int64),
        30,
    )
    log_probs = fitted(name).log_probs(nobody)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0, atol=1e-5)
    assert np.isfinite(log_probs).all()


@every_competitor
def test_no_contexts_have_no_answers(name: str, fitted: Fitted, contexts: Contexts) -> None:
    nobody = contexts.observations[slice(0, 0)]
    assert fitted(name).log_probs(nobody).shape == fitted(name).scores(nobody).shape == (0, 30)


@pytest.mark.parametrize("name", [name for name in COMPETITORS if name != "Random"])
@pytest.mark.parametrize("n_titles", [12, 40])
def test_contexts_of_another_catalogue_are_refused(name: str, n_titles: int, fitted: Fitted) -> None:
    """Random knows none of its own."""
    other = World(WorldConfig(n_titles=n_titles, history_length=6)).contexts(3).observations
    for ask in (fitted(name).log_probs, fitted(name).scores):
        with pytest.raises(ConfigError, match=f"over 30 titles, .* over {n_titles}"):
            ask(other)


@every_competitor
def test_it_answers_to_histories_longer_than_the_logs(name: str, fitted: Fitted, contexts: Contexts) -> None:
    observations = contexts.observations
    for _ in range(4):
        best = fitted(name).log_probs(observations).argmax(axis=1)
        observations = observations.append(best, np.full(20, 4.0, dtype=np.float32), 0.7)
    log_probs = fitted(name).log_probs(observations)
    assert (np.isneginf(log_probs) == observations.seen()).all()
    assert observations.seen().sum(axis=1).tolist() == [10] * 20


@every_referee
def test_a_referee_answers_to_scoring_only(name: str, fitted: Fitted, world: World, contexts: Contexts) -> None:
    agent, observations, users = fitted(name), contexts.observations, contexts.users
    for answer in (agent.log_probs, agent.scores):
        with pytest.raises(PolicyError, match=f"{name} .*world.evaluate"):
            answer(observations)
    scores = ranking_scores(agent, observations, world, users)
    log_probs = log_probs_of(agent, observations, world, users)
    assert (np.isneginf(scores) == observations.seen()).all()
    assert (log_probs.argmax(axis=1) == scores.argmax(axis=1)).all()
    assert (np.exp(log_probs).max(axis=1) == 1.0).all()


# -- fitting ------------------------------------------------------------------------------------------------------


@every_competitor
def test_equal_seeds_give_equal_agents_whatever_the_global_state(
    name: str,
    make: Make,
    fitted: Fitted,
    log: InteractionLog,
    backbone: HSTU,
    rewards: RewardEnsemble,
    contexts: Contexts,
) -> None:
    first = fitted(name)
    with global_random_state_kept(seed=8):
        again = make(name).fit(log, backbone, rewards, seed=0)
    assert same(first, again, contexts.observations)
    assert first.record == again.record


@every_learner
def test_it_learns_something_and_another_seed_learns_otherwise(
    name: str,
    make: Make,
    fitted: Fitted,
    log: InteractionLog,
    backbone: HSTU,
    rewards: RewardEnsemble,
    contexts: Contexts,
) -> None:
    """Were the kept state the start's, much of what is asked on this page would say nothing."""
    other = make(name).fit(log, backbone, rewards, seed=1)
    pretrained, unseen = fitted("Pretrained").log_probs(contexts.observations), ~contexts.observations.seen()
    for agent in (fitted(name), other):
        assert agent.record.best_step > 0
        change = agent.log_probs(contexts.observations)[unseen] - pretrained[unseen]
        assert np.abs(change).max() > 1e-3
    assert not same(fitted(name), other, contexts.observations)


@every_agent
def test_fitting_changes_nothing_that_it_was_handed(
    name: str, make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    mine = copy.deepcopy(backbone).requires_grad_(True).train()  # flags that a careless fit would change
    modules = [mine, *rewards.members]

    def snapshot() -> list[Any]:
        weights = [value.clone() for module in modules for value in module.state_dict().values()]
        flags = [p.requires_grad for module in modules for p in module.parameters()]
        return [weights, flags, [module.training for module in modules], pickle.dumps(log.sequences())]

    weights, *rest = snapshot()
    make(name).fit(log, mine, rewards)
    weights_after, *rest_after = snapshot()
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_after, strict=True))
    assert rest == rest_after


@pytest.mark.parametrize("name", BLIND)
def test_it_never_sees_the_truth(
    name: str,
    make: Make,
    fitted: Fitted,
    log: InteractionLog,
    backbone: HSTU,
    rewards: RewardEnsemble,
    contexts: Contexts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No world answers, none can be made; the log has lost where it comes from, who its users are, and propensities
    unless they are asked for; and the agent is the same, bit for bit."""

    def forbidden(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("an agent asked the world")

    before = fitted(name)
    for member in dir(World):
        if not member.startswith("__"):
            monkeypatch.setattr(World, member, property(forbidden))
    monkeypatch.setattr(World, "__init__", forbidden)
    with pytest.raises(AssertionError, match="asked the world"):
        World()
    propensities = log.propensities if make(name).needs_propensities else None
    blind = replace(log, user=log.user[-1] - log.user, provenance=None, propensities=propensities)
    agent = make(name).fit(blind, backbone, rewards)
    assert same(agent, before, contexts.observations)


@pytest.mark.parametrize("name", ON_A_BACKBONE)
def test_what_it_needs_is_asked_for(
    name: str, make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    with pytest.raises(ConfigError, match=rf"{name} .*pretrain\(log\)"):
        make(name).fit(log)
    if AGENTS[name].needs_ensemble:
        with pytest.raises(ConfigError, match=rf"{name} .*fit_reward_ensemble\(log, backbone\)"):
            make(name).fit(log, backbone)
    other_world = World(WorldConfig(n_titles=12, history_length=4)).generate_log(20, expose_propensities=True)
    with pytest.raises(ConfigError, match="12 titles and the HSTU 30"):
        make(name).fit(other_world, backbone, rewards)
    if AGENTS[name].needs_ensemble:
        foreign = HSTU(HSTUConfig(dimensions=8, max_length=4), 12)
        with pytest.raises(ConfigError, match="12 titles and the RewardEnsemble 30"):
            make(name).fit(other_world, foreign, rewards)


@every_competitor
def test_propensities_and_the_world_are_asked_for(
    name: str, make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    if make(name).needs_propensities:
        with pytest.raises(ConfigError, match="carries no propensities"):
            make(name).fit(replace(log, propensities=None), backbone, rewards)
    if AGENTS[name].informed:
        with pytest.raises(ConfigError, match=rf"{name} .*meet\(world\)"):
            AGENTS[name]().fit(log, backbone, rewards)


@every_agent
def test_its_strength_is_an_option(name: str, make: Make) -> None:
    """Five values from the weakest to the strongest, the default among them, and its config takes them all."""
    strength = AGENTS[name].strength
    if strength is None:
        return
    default = getattr(make(name).config, strength.option)
    grid = strength.grid(default)
    assert default in grid
    assert len(set(grid)) == 5
    assert list(grid) == sorted(grid, reverse=not strength.rises)
    for value in grid:
        assert getattr(make(name, **{strength.option: value}).config, strength.option) == value


@every_learner
def test_a_log_that_cannot_be_learned_from_is_refused(
    name: str, make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    for users in (0, 1):
        with pytest.raises(ConfigError, match=f"{users} users"):
            make(name).fit(log.rows(slice(0, 6 * users)), backbone, rewards)
    other_world = World(WorldConfig(n_titles=12, history_length=4)).generate_log(20, expose_propensities=True)
    with pytest.raises(ConfigError, match="one world"):
        make(name).fit(log, backbone, rewards, validation=other_world)


@every_competitor
def test_it_learns_without_rewards_unless_it_asks_for_them(
    name: str, make: Make, fitted: Fitted, log: InteractionLog, backbone: HSTU, contexts: Contexts
) -> None:
    if not AGENTS[name].needs_ensemble:
        assert same(make(name).fit(log, backbone), fitted(name), contexts.observations)


# -- equal footing ------------------------------------------------------------------------------------------------


@every_learner
def test_it_takes_the_steps_of_its_config(
    name: str, make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    """As torch counts them, not as the record says. (PPO rounds to whole rollouts; 64 is two.)"""
    taken: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    try:
        told: list[int] = []
        steps = TrainingConfig(steps=64, batch_users=32, warmup_steps=3, checks=2)
        agent = make(name, training=steps).fit(
            log, backbone, rewards, after_check=lambda step, objective: told.append(step)
        )
    finally:
        handle.remove()
    assert sum(taken) == agent.record.gradient_steps == 64
    assert [step for step in told if step > 0] == [32, 64]
    assert agent.record.best_step in {0, 32, 64}


@pytest.mark.parametrize(
    ("name", "option", "new"),
    [
        ("CQL", "head_rate", "head.title"),
        ("TruthSupervised", "head_rate", "head.title"),
        ("ConditionedBC", "condition_rate", "mixes"),
    ],
)
def test_what_starts_from_nothing_learns_at_its_own_rate(
    name: str, option: str, new: str, make: Make, fitted: Fitted, log: InteractionLog, backbone: HSTU
) -> None:
    """By default it moves far, at a rate of almost nothing it stays, and the backbone moves either way."""
    still = make(name, **{option: 1e-6}).fit(log, backbone)
    moved = {agent: float(agent.state()[new].abs().max()) for agent in (fitted(name), still)}
    assert moved[fitted(name)] > 1e-2
    assert moved[still] < 1e-5
    assert still.record.best_step > 0
    assert not torch.equal(still.state()["backbone.titles"], backbone.titles)


OWN_LOSS = [name for name in LEARNERS if "PPO" not in name and "GRPO" not in name]
"""What measures its own loss on validation users; tests of the others' objectives stand beside them."""


@pytest.mark.parametrize("name", OWN_LOSS)
def test_it_stops_on_validation_users(
    name: str, make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    """The same steps on the same users: the objective is that of whoever is held out."""
    objectives: list[list[float]] = [[], []]
    for noted, held_out in zip(objectives, (log.rows(slice(0, 60)), log.rows(slice(60, 150))), strict=True):

        def note(step: int, objective: float, noted: list[float] = noted) -> None:
            noted.append(objective)

        agent = make(name, training=TrainingConfig(steps=2, batch_users=16, warmup_steps=1, checks=1))
        agent.fit(log, backbone, rewards, held_out, after_check=note)
    assert abs(objectives[0][-1] - objectives[1][-1]) > 1e-6


def test_defaults_are_the_same_for_all() -> None:
    assert {configs.config_id(AGENTS[name].config_type().training) for name in LEARNERS} == {  # type: ignore[attr-defined]
        configs.config_id(TrainingConfig())
    }
    default = PPO().config
    assert default.rollouts * default.steps_per_rollout == TrainingConfig().steps


def test_learners_from_a_log_see_the_same_batches(
    make: Make, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, drawn = histories._endless_rows, {}
    offline = [name for name in LEARNERS if name not in ("PPO", "OnlinePPO")]  # they draw contexts from an environment
    for name in offline:
        rows: list[list[int]] = []

        def noting(*arguments: Any, rows: list[list[int]] = rows) -> Iterator[torch.Tensor]:
            for batch in original(*arguments):
                rows.append(batch.tolist())
                yield batch

        monkeypatch.setattr(histories, "_endless_rows", noting)
        make(name, training=TrainingConfig(steps=6, checks=1, batch_users=16)).fit(log, backbone, rewards)
        drawn[name] = rows
    assert len(offline) >= 5
    assert all(rows == drawn["BC"] and len(rows) == 6 for rows in drawn.values())


# -- configs ------------------------------------------------------------------------------------------------------


@every_agent
def test_options_are_refused_by_name(name: str) -> None:
    kind = AGENTS[name]
    with pytest.raises(ConfigError, match=f"{name} has no option 'strength'; it has"):
        kind(strength=1)
    with pytest.raises(ConfigError, match=f"{name} takes a {kind.config_type.__name__}, got dict"):
        kind({"beta": 1.0})
    for field in fields(kind.config_type):
        bad: dict[Any, tuple[Any, ...]] = {
            "int": (math.nan, 1.5, "one", None),
            "float": (math.nan, math.inf, "one", None),
            "str": ("nonsense", 3),
            "TrainingConfig": (5, None, {"steps": 3}),
        }
        kind_of_field = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        for value in bad.get(kind_of_field, ()):
            with pytest.raises(ConfigError, match=rf"\.{field.name} must be"):
                kind(**{field.name: value})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ASFT", "beta", 0.0),
        ("ASFT", "clip", 0.0),
        ("ASFT", "weight", "cubic"),
        ("ASFT", "advantage", "truth"),
        ("ASFT", "baseline", "zero"),
        ("CQL", "alpha", -0.1),
        ("CQL", "temperature", 0.0),
        ("CQL", "head_rate", -1.0),
        ("RSDPO", "beta", -0.1),
        ("RSDPO", "candidates", 1),
        ("RSDPO", "interval", -1.0),
        ("PPO", "kl_weight", -0.1),
        ("PPO", "rollout", 1_000),  # no multiple of n_envs
        ("PPO", "minibatch", 300),  # does not divide the rollout
        ("PPO", "clip_range", 0.0),
        ("PPO", "epochs", 0),
        ("PPO", "learning_rate", 0.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, option: str, value: Any) -> None:
    where = "rollout" if option == "minibatch" else option
    with pytest.raises(ConfigError, match=rf"Config\.{where} must be"):
        AGENTS[name](**{option: value})


@every_agent
def test_its_config_is_frozen_and_plain(name: str, make: Make) -> None:
    config = make(name).config
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    assert hash(config) == hash(replace(config))
    values = configs.to_dict(config)
    assert json.loads(json.dumps(values)) == values
    assert AGENTS[name](config).config == config


# -- saving -------------------------------------------------------------------------------------------------------


@every_agent
def test_it_comes_back_from_its_files(
    name: str, fitted: Fitted, contexts: Contexts, world: World, tmp_path: Path
) -> None:
    agent = fitted(name)
    agent.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"agent.json", "agent.safetensors"}
    loaded = load_agent(tmp_path / "saved")
    assert type(loaded) is type(agent)
    assert loaded.config == agent.config
    assert loaded.record == agent.record
    observations, users = contexts.observations, contexts.users
    for ask in (log_probs_of, ranking_scores):
        np.testing.assert_array_equal(ask(loaded, observations, world, users), ask(agent, observations, world, users))
    loaded.save(tmp_path / "again")
    for file in ("agent.json", "agent.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in agent.state().values())


@pytest.fixture
def saved(fitted: Fitted, tmp_path: Path) -> Path:
    """A directory that holds a saved BC."""
    fitted("BC").save(tmp_path / "saved")
    return tmp_path / "saved"


class Evil:
    """Its pickle makes a directory where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_files_of_before_records_were_kept_can_be_loaded(saved: Path, fitted: Fitted, contexts: Contexts) -> None:
    about = json.loads((saved / "agent.json").read_text())
    assert about.pop("record") == {"gradient_steps": 32, "best_step": fitted("BC").record.best_step, "samples": 0}
    (saved / "agent.json").write_text(json.dumps(about))
    loaded = load_agent(saved)
    assert same(loaded, fitted("BC"), contexts.observations)
    assert loaded.record.gradient_steps == 0


@pytest.mark.parametrize("file", ["agent.json", "agent.safetensors"])
def test_no_pickle_is_ever_read(saved: Path, tmp_path: Path, file: str) -> None:
    marker = tmp_path / "marker"
    (saved / file).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(RecsimError, match="saved"):
        load_agent(saved)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # had it been read, it would have shown


@pytest.mark.parametrize("file", ["agent.json", "agent.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_named(saved: Path, file: str, kept: float) -> None:
    whole = (saved / file).read_bytes()
    (saved / file).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(RecsimError, match="saved"):
        load_agent(saved)


@pytest.mark.parametrize("file", ["agent.json", "agent.safetensors"])
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(RecsimError, match="saved"):
        load_agent(saved)


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '"BC"', "{}", '{"agent": "BC"}', '{"agent": ["BC"], "config": {}, "shape": {}}']
)
def test_foreign_json_is_named(saved: Path, content: str) -> None:
    (saved / "agent.json").write_text(content)
    with pytest.raises(CheckpointError, match="no agent that can be loaded"):
        load_agent(saved)


def test_an_unknown_agent_is_named(saved: Path) -> None:
    about = json.loads((saved / "agent.json").read_text())
    (saved / "agent.json").write_text(json.dumps(about | {"agent": "Nobody"}))
    with pytest.raises(UnknownNameError, match="no agent 'Nobody'; there are"):
        load_agent(saved)


@pytest.mark.parametrize("other", ["CQL", "Popularity", "Oracle"])
def test_files_of_two_agents_do_not_make_one(saved: Path, fitted: Fitted, tmp_path: Path, other: str) -> None:
    fitted(other).save(tmp_path / "other")
    for file in ("agent.json", "agent.safetensors"):
        mixed = tmp_path / f"mixed {file}"
        mixed.mkdir()
        for name in ("agent.json", "agent.safetensors"):
            source = tmp_path / ("other" if name == file else "saved")
            (mixed / name).write_bytes((source / name).read_bytes())
        with pytest.raises(CheckpointError):
            load_agent(mixed)


JUNK = st.sampled_from([None, True, -1, 0, 3, 1.5, math.nan, math.inf, "x", "abc", [], ["a"], [[1]], {}, {"a": 1}])


def paths(content: Any) -> list[tuple[str, ...]]:
    """All places in nested dictionaries."""
    if not isinstance(content, dict):
        return []
    return [(key, *rest) for key, value in content.items() for rest in [(), *paths(value)]]


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), junk=JUNK, delete=st.booleans())
def test_whatever_stands_in_the_json_loading_fails_by_name(
    saved: Path, fitted: Fitted, data: st.DataObject, junk: Any, delete: bool
) -> None:
    original = (saved / "agent.json").read_text()
    about = json.loads(original)
    *above, last = data.draw(st.sampled_from(paths(about)))
    place = about
    for key in above:
        place = place[key]
    if delete:
        del place[last]
    else:
        place[last] = junk
    (saved / "agent.json").write_text(json.dumps(about))
    with suppress(RecsimError):  # junk may also be harmless
        load_agent(saved)
    (saved / "agent.json").write_text(original)


# -- learning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def obvious() -> dict[str, float]:
    """By agent, the true value of its three first titles in a world without noise, where titles are loved (5) or
    not (1) and users mostly follow fashion: who learns from scores must leave imitation far behind."""
    config = WorldConfig(
        n_titles=30,
        history_length=8,
        n_epochs=1,
        reward_noise=0.0,
        satisfaction_slope=4.0,
        quality_deviation=1.0,
        leniency_deviation=0.2,
        taste_dimensions=2,
        n_genres=5,
        discernment_alpha=0.3,
        discernment_beta=1.5,
    )
    world = World(config)
    log = world.generate_log(500, expose_propensities=True)
    held_out, contexts = world.generate_log(100, "validation", expose_propensities=True), world.contexts(400)
    imitation = TrainingConfig(steps=150, batch_users=32, learning_rate=1e-2, warmup_steps=10, checks=3)
    steps = TrainingConfig(steps=96, batch_users=32, learning_rate=5e-3, warmup_steps=5, checks=3)
    backbone = pretrain(log, HSTUConfig(dimensions=16, n_layers=1), imitation, held_out)
    rewards = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=steps), held_out)
    truth, values = world.satisfaction(contexts.users), {}
    for name, kind in AGENTS.items():
        agent = kind(**({"training": steps} if trains(name) else {}))
        if isinstance(agent, InformedAgent):
            agent.meet(world)
        agent.fit(log, backbone, rewards, held_out)
        listed = metrics.top_k(ranking_scores(agent, contexts.observations, world, contexts.users), 3)
        values[name] = float(np.take_along_axis(truth, listed, axis=1).mean())
    return values


@pytest.mark.parametrize("name", [name for name in LEARNERS if AGENTS[name].uses_rewards])
def test_it_learns_what_is_obvious(name: str, obvious: dict[str, float]) -> None:
    """BC stands at 3.3, the oracle at 4.9. Weighting by the raw score, from 1 to 5, says the least; it still says
    something."""
    least = 0.4 if name == "RewardWeightedBC" else 0.7
    assert obvious[name] > obvious["BC"] + least
    assert obvious[name] <= obvious["Oracle"]


def test_imitation_alone_does_not_learn_it(obvious: dict[str, float]) -> None:
    assert obvious["Random"] < obvious["BC"] < obvious["Random"] + 0.5
    assert obvious["Pretrained"] == pytest.approx(obvious["BC"], abs=0.3)


@pytest.mark.parametrize("name", [n for n, kind in AGENTS.items() if not kind.referee and n != "Random"])
def test_an_agent_that_has_not_learned_says_so(name: str, world: World) -> None:
    with pytest.raises(PolicyError, match=f"{name} is not fitted yet; call fit\\(log, backbone"):
        world.evaluate(AGENTS[name](), 3)
