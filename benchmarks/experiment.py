"""What the suites share: worlds of either kind, the logs of one world, and everything fitted on them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from recsim_gr import configs
from recsim_gr.backbones import BackboneConfig, HSTUConfig, backbone_for, backbone_type, new_backbone
from recsim_gr.behaviour import BehaviourConfig
from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.noise import NOISE_MODELS
from recsim_gr.prefixes import imitation_loss
from recsim_gr.pretraining import PRETRAINING
from recsim_gr.replay import ReplayConfig, ReplayWorld, load_matrix
from recsim_gr.rewards import RewardEnsembleConfig
from recsim_gr.training import TrainingConfig, train
from recsim_gr.world import World, WorldConfig
from recsim_gr.world_base import USERS_PER_CONTEXT_SEED, WorldBase

WORLDS = ("simulated", "replay")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Worlds, sizes and schedules; the defaults are preset ``quick``."""

    preset: str = "quick"
    """Which preset this config started from."""
    world: str = "simulated"
    """``simulated``, or ``replay`` over the fully observed matrix in ``data``."""
    data: str = ""
    """Path of the matrix of a replayed world."""
    noise_model: str = "watch_time"
    noise_levels: tuple[float, ...] = (0.0, 0.15, 0.35, 0.6, 1.0)
    """Settings of the dial, from all but the truth to none of it; closer together where reliability falls fastest."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Worlds, each with its own users, titles and training; three make a picture, ten a claim. Seeds from 1000 on
    are development seeds, on which defaults were chosen, and are never reported."""
    n_titles: int = 200
    """Of a simulated world; a replayed one has its own."""
    history_length: int = 20
    world_options: tuple[str, ...] = ()
    """Further fields of the world's config, each as ``name=value``: ``cold_share=0.2``, ``order_effect=1``, …"""
    n_users: int = 4_000
    """Training users, at most as many as a replayed world has."""
    validation_users: int = 600
    """For early stopping: a standard error of about 0.013 nats of the likelihood."""
    judge_users: int = 4_000
    """The judge learns from as many users as the agents do, none of them theirs."""
    test_contexts: int = 2_000
    """A standard error of about 0.015 of a top-ten value, far less of a paired difference."""
    rollout_contexts: int = 400
    """For the three-step returns, which cost six times a plain evaluation."""
    backbone: BackboneConfig = field(default_factory=lambda: HSTUConfig(n_layers=1, dropout=0.1))
    """One layer, for the budget of a cell; suite ``convergence`` says how far the likelihood is from its best."""
    pretraining: TrainingConfig = PRETRAINING
    rewards: RewardEnsembleConfig = field(default_factory=RewardEnsembleConfig)
    judge_pretraining: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=256, learning_rate=1e-2, warmup_steps=50, checks=4)
    )
    """Two fifths of the agents' own: the judge's backbone only serves its scores, which go on training it."""
    judge: RewardEnsembleConfig = field(
        default_factory=lambda: RewardEnsembleConfig(members=2, training=TrainingConfig(steps=200))
    )
    """Two members, trained for 200 steps: only their mean is used."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.world in WORLDS, self, "world", f"one of {', '.join(WORLDS)}")
        require(self.noise_model in NOISE_MODELS, self, "noise_model", f"one of {', '.join(NOISE_MODELS)}")
        require(bool(self.noise_levels), self, "noise_levels", "one setting of the dial or more")
        require(_all_distinct(self.noise_levels), self, "noise_levels", "free of repeats")
        in_range = all(isinstance(x, (int, float)) and 0.0 <= x <= 1.0 for x in self.noise_levels)
        require(in_range, self, "noise_levels", "settings between 0 and 1")
        require(bool(self.seeds) and _all_distinct(self.seeds), self, "seeds", "one seed or more, no repeats")
        legal = all(isinstance(x, int) and 0 <= x < 2**62 for x in self.seeds)
        require(legal, self, "seeds", "integers from 0 to 2^62 - 1")
        require(
            self.test_contexts <= USERS_PER_CONTEXT_SEED, self, "test_contexts", f"at most {USERS_PER_CONTEXT_SEED}"
        )
        for name in ("n_users", "validation_users", "judge_users", "test_contexts", "rollout_contexts"):
            require(getattr(self, name) >= 2, self, name, "at least 2")
        _parsed(self.world_options, ReplayConfig if self.world == "replay" else WorldConfig)
        if self.world == "replay" and not self.data:
            raise ConfigError("a replayed world needs its matrix: --data PATH of an npz file")
        if self.world == "simulated" and self.data:
            raise ConfigError("--data is for replayed worlds; add --world replay, or leave it out")


SHORT = TrainingConfig(steps=20, learning_rate=1e-2, warmup_steps=5, checks=2)
"""Of presets ``smoke``: long enough to run through everything, too short to mean anything."""


def build_world(config: ExperimentConfig, noise: float, seed: int) -> WorldBase:
    """The world of a cell.

    Raises:
        ConfigError: settings that make no sense together.
        DataFileError: a matrix that cannot be read.
    """
    shared: dict[str, Any] = {
        "history_length": config.history_length,
        "noise_model": config.noise_model,
        "reward_noise": noise,
        "seed": seed,
    }
    if config.world == "replay":
        options = _parsed(config.world_options, ReplayConfig)
        return ReplayWorld(ReplayConfig(path=config.data, **shared, **options))
    return World(WorldConfig(n_titles=config.n_titles, **shared, **_parsed(config.world_options, WorldConfig)))


def _number_or_flag(value: str) -> int | float | bool:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return int(value)
    except ValueError:
        return float(value)


SUITE_FIELDS = frozenset({"n_titles", "history_length", "noise_model", "reward_noise", "seed", "path", "sha256"})
"""Fields of a world's config that a suite sets by options of its own."""


def _parsed(options: tuple[str, ...], kind: type[BehaviourConfig]) -> dict[str, Any]:
    """``name=value`` texts as fields of a world's config.

    Raises:
        ConfigError: not of that form, an unknown field, one that the suite sets itself, or one given twice.
    """
    kinds = {f.name: f.type for f in fields(kind) if f.name not in SUITE_FIELDS}
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, value = str(option).partition("=")
        if not equals or name not in kinds:
            raise ConfigError(f"world option {option!r}: must be name=value, with a name of {', '.join(sorted(kinds))}")
        if name in parsed:
            raise ConfigError(f"world option {name!r} is given twice")
        try:
            parsed[name] = value if kinds[name] in (str, "str") else _number_or_flag(value)
        except ValueError as error:
            raise ConfigError(f"world option {option!r}: {value!r} is no number, true or false") from error
    return parsed


def backbone_of_kind(name: str, preset: BackboneConfig) -> BackboneConfig:
    """The config of another backbone, for a preset that was made for one.

    What the preset sets otherwise than its own kind's defaults carries over, where the other has the field; the rest
    are the other's defaults, since a default is a choice for one kind (SASRec's plain product, a set's no positions).

    Raises:
        UnknownNameError: no such backbone; lists those that are.
        ConfigError: a value that the other refuses.
    """
    kind = backbone_type(name).config_type
    if kind is type(preset):
        return preset
    usual, known = type(preset)(), {f.name for f in fields(kind)}
    chosen = {f.name: getattr(preset, f.name) for f in fields(preset) if f.name in known}
    return kind(**{option: value for option, value in chosen.items() if value != getattr(usual, option)})


def experiment_identity(config: ExperimentConfig) -> dict[str, Any]:
    """The config as JSON values; a data file counts by its content, not by where it lies, and a backbone by its name
    too, since two kinds may have the same fields.

    Raises:
        ConfigError: a replayed world that does not fit its settings.
        DataFileError: a matrix that cannot be read.
    """
    values = configs.to_dict(config)
    values["backbone"]["kind"] = backbone_for(config.backbone).name
    if config.world == "replay":
        build_world(config, config.noise_levels[0], config.seeds[0])  # before anything is written or run
        values["data"] = Path(config.data).name
        values["data_sha256"] = load_matrix(config.data).sha256
    return values


@dataclass(frozen=True)
class Logs:
    """The logs of one world: disjoint users."""

    train: InteractionLog
    validation: InteractionLog
    judge: InteractionLog

    @classmethod
    def of(cls, world: WorldBase, config: ExperimentConfig, propensities: bool = False) -> "Logs":
        """Generates them, with as many users as the world has where it has fewer than asked for.

        Without their provenance: the config of a world is enough to build it, truth and all.

        Args:
            world: whose users.
            config: how many.
            propensities: whether the training and validation logs carry them.
        """
        return cls(
            *(
                replace(world.generate_log(world.at_most(split, n), split, expose_propensities=wanted), provenance=None)
                for split, n, wanted in (
                    ("train", config.n_users, propensities),
                    ("validation", config.validation_users, propensities),
                    ("judge", config.judge_users, False),
                )
            )
        )

    def without_propensities(self) -> "Logs":
        """The same logs, for agents that do not ask for them."""
        return Logs(*(replace(log, propensities=None) for log in (self.train, self.validation, self.judge)))


def log_sizes_of(config: ExperimentConfig, wanted: Iterable[int]) -> list[int]:
    """Numbers of training users that the worlds have, ascending: all they have in place of larger ones."""
    if config.world == "simulated":
        return sorted(set(wanted))
    world = build_world(config, config.noise_levels[0], config.seeds[0])
    return sorted({world.at_most("train", n) for n in wanted})


def seconds_per_step(config: ExperimentConfig, steps: int = 20) -> float:
    """Wall seconds of a gradient step of imitation at this config's sizes, measured here and now."""
    world = build_world(config, config.noise_levels[0], config.seeds[0])
    histories = Histories(world.generate_log(world.at_most("train", 200)))
    backbone = new_backbone(replace(config.backbone, max_length=histories.longest), world.n_titles)
    schedule = TrainingConfig(steps=steps, checks=1)
    for _ in range(2):  # the first run pays for warming up
        start = time.perf_counter()
        train(backbone, lambda b: imitation_loss(backbone, b), lambda: 0.0, histories, schedule, 0, "estimate")
    return (time.perf_counter() - start) / steps


def cell_name(noise: float, seed: int) -> str:
    """Names a world's file; levels that differ are named apart, however close they are."""
    short = f"{noise:g}"
    return f"noise-{short if float(short) == noise else repr(noise)}-seed-{seed}"


def _all_distinct(values: tuple[Any, ...]) -> bool:
    return len(set(values)) == len(values)
