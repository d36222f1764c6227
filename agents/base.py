"""What every agent is made of: configs with overrides, one `fit`, log-probabilities, saving without pickle."""

import copy
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from recsim_gr import configs
from recsim_gr.backbones import Backbone, build_backbone
from recsim_gr.checkpoints import BROKEN, save_tensors
from recsim_gr.errors import CheckpointError, ConfigError, PolicyError, RecsimError, UnknownNameError
from recsim_gr.files import read_json, write_json
from recsim_gr.histories import Batch, HistorySource, histories_of, split_logs, tensors
from recsim_gr.log import AnyLog
from recsim_gr.observations import Observations
from recsim_gr.reward_tables import RewardTable
from recsim_gr.rewards import RewardEnsemble
from recsim_gr.training import TrainingConfig, TrainingRecord, train

AfterCheck = Callable[[int, float], None]


@dataclass(frozen=True)
class AgentConfig:
    """What all agents' configs have in common."""

    def __post_init__(self) -> None:
        configs.require_finite_numbers(self)


@dataclass(frozen=True)
class FineTuningConfig(AgentConfig):
    """What all agents that continue the pretrained backbone have in common: one schedule, so that they are
    comparable."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The same steps, batches, rate and stopping rule for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.require(isinstance(self.training, TrainingConfig), self, "training", "a TrainingConfig")


@dataclass
class FitRecord:
    """What fitting cost and where it stopped.

    Attributes:
        gradient_steps: how many were taken.
        best_step: after how many of them the kept state stood.
        samples: online samples drawn from an environment; 0 for agents that learn from the log alone.
        preparation_seconds: processor time before and between gradient steps: rewards of the whole log, pairs,
            rollouts. Times are no part of what makes two records equal.
    """

    gradient_steps: int = 0
    best_step: int = 0
    samples: int = 0
    preparation_seconds: float = field(default=0.0, compare=False)


RECORDED = tuple(f.name for f in fields(FitRecord) if f.compare)
"""What of a record is kept with an agent."""


@dataclass(frozen=True)
class Strength:
    """Which option decides how far an agent goes from imitation towards its rewards.

    Attributes:
        option: of the agent's config.
        rises: whether a higher value is stronger; a temperature or a penalty is stronger where it is lower.
        values: what is tried, from the weakest to the strongest; by default the option's default, doubled and halved
            twice, so that all agents have as many trials over as wide a range, and none was chosen. (Trials may come to
            the same where scores are tied: see `FilteredBCConfig.fraction` and `ConditionedBCConfig.target`.)
    """

    option: str
    rises: bool = False
    values: tuple[float, ...] = ()

    def grid(self, default: float) -> tuple[float, ...]:
        """The values, from the weakest to the strongest; ``default`` is the option's."""
        if self.values:
            return self.values
        doubled = tuple(default * 2.0**k for k in (2, 1, 0, -1, -2))
        return doubled[::-1] if self.rises else doubled


AGENTS: dict[str, type["Agent"]] = {}
"""All registered agents by name."""


def register(agent: type["Agent"]) -> type["Agent"]:
    """Makes an agent known by its ``name``: to suites, to the command line and to the contract test.

    Raises:
        ConfigError: the name is taken by another class.
    """
    known = AGENTS.get(agent.name, agent)
    if (known.__module__, known.__qualname__) != (agent.__module__, agent.__qualname__):
        raise ConfigError(f"there is already an agent {agent.name!r}; choose another name")
    AGENTS[agent.name] = agent
    return agent


def agent_type(name: str) -> type["Agent"]:
    """The registered agent of that name.

    Raises:
        UnknownNameError: no such agent; lists those that are.
    """
    if name not in AGENTS:
        raise UnknownNameError(f"no agent {name!r}; there are {', '.join(AGENTS)}")
    return AGENTS[name]


def find_agent(name: str) -> type["Agent"]:
    """A registered agent by its name, or one of your own as ``module:Class``, which imports the module.

    Never call it with what stands in a file that is loaded: importing runs code.

    Raises:
        UnknownNameError: no such agent; the module cannot be imported or has no such agent.
    """
    if ":" not in name:
        return agent_type(name)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise UnknownNameError(
            f"{name}: module {module!r} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise UnknownNameError(f"{name}: module {module!r} has no class {attribute!r} that is an Agent")
    if not isinstance(getattr(found, "name", None), str):
        raise UnknownNameError(f"{name}: the class has no name; give it one: name = {attribute!r}")
    return register(found)


def not_fitted(agent: "Agent") -> PolicyError:
    """The complaint about an agent that is asked before it has learned."""
    given = "log, backbone, rewards" if agent.needs_ensemble else "log, backbone"
    return PolicyError(f"{agent.name} is not fitted yet; call fit({given}) first")


class Agent(ABC):
    """A policy over titles.

    ``ASFT(beta=0.5)`` is ``ASFT(ASFTConfig(beta=0.5))``.

    Args:
        config: the agent's own frozen config.
        overrides: fields of the config to set.

    Raises:
        ConfigError: a field that the config does not have, or a value that it refuses.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[AgentConfig]] = AgentConfig
    referee: ClassVar[bool] = False
    """Whether it knows the truth: a ceiling, not a competitor."""
    uses_rewards: ClassVar[bool] = False
    """Whether what it learns depends on scores, by themselves or through the reward ensemble."""
    needs_ensemble: ClassVar[bool] = False
    """Whether `fit` asks for a reward ensemble."""
    informed: ClassVar[bool] = False
    """Whether it learns from what no log holds, see `InformedAgent`: a reference, not a competitor."""
    strength: ClassVar[Strength | None] = None
    """The option that suites sweep; None for an agent that has no such choice."""

    def __init__(self, config: Any = None, **overrides: Any) -> None:
        known = {f.name for f in fields(self.config_type)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            message = f"{self.name} has no option {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}"
            raise ConfigError(message)
        if config is not None and not isinstance(config, self.config_type):
            raise ConfigError(f"{self.name} takes a {self.config_type.__name__}, got {type(config).__name__}")
        self.config: Any = replace(config or self.config_type(), **overrides)
        self.record = FitRecord()

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        """Learns from a log.

        Args:
            log: what to learn from; in shards, agents that need r̂ on the whole log keep it in the directory
                ``rewards.tables_in``, and `PPO` cannot.
            backbone: the pretrained backbone, π_ref; copied, never changed.
            rewards: the fitted reward ensemble, for agents that need it.
            validation: users to stop on; without it, the last tenth of the log's users.
            seed: of everything random.
            after_check: told (gradient step, objective) along the way.

        Raises:
            ConfigError: something the agent needs is missing, or the parts are over different catalogues.
            TrainingError: training diverged.
        """
        return self

    @abstractmethod
    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        """(n, I) log π(a | x); -inf for titles that are seen or not out yet."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name in ("policy", "q_function"):  # what `fit` makes
                raise not_fitted(self)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def needs_propensities(self) -> bool:
        """Whether `fit` asks for a log with propensities; no other agent is handed them."""
        return False

    @property
    def ranks_by_log_probs(self) -> bool:
        """Whether `scores` is not the agent's own."""
        return type(self).scores is Agent.scores

    def scores(self, observations: Observations) -> NDArray[np.float32]:
        """(n, I) what the agent ranks by; its log-probabilities unless it has better."""
        return self.log_probs(observations)

    # -- saving: JSON beside safetensors, never pickle -----------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything learned, as named tensors."""
        return {}

    def shape(self) -> dict[str, Any]:
        """What must be known to build the agent before its state is loaded, as JSON values."""
        return {}

    def restore(self, shape: dict[str, Any], state: dict[str, Tensor]) -> None:
        """The inverse of `shape` and `state`; an agent that learns nothing has nothing to restore."""
        if shape or state:
            raise CheckpointError(f"{self.name} keeps nothing, but the checkpoint holds something")

    def save(self, directory: str | Path) -> None:
        """Writes ``agent.json`` and ``agent.safetensors`` into a directory: what was learned and how far it went, but
        for the times, so that equal agents have equal files.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        directory = Path(directory)
        save_tensors(directory / "agent.safetensors", self.state())
        about = {"agent": self.name, "config": configs.to_dict(self.config), "shape": self.shape()}
        about["record"] = {name: getattr(self.record, name) for name in RECORDED}
        write_json(directory / "agent.json", about)


def load_agent(directory: str | Path) -> Agent:
    """Loads what `Agent.save` wrote; runs no code from the files.

    Raises:
        UnknownNameError: an agent that is not registered.
        CheckpointError: files that are missing, truncated or do not fit each other.
    """
    directory = Path(directory)
    about = read_json(directory / "agent.json")
    try:
        kind = agent_type(about["agent"])
        values = dict(about["config"])
        if "training" in values:
            values["training"] = configs.from_dict(TrainingConfig, values["training"])
        agent = kind(configs.from_dict(kind.config_type, values))
        agent.restore(about["shape"], load_file(directory / "agent.safetensors"))
        known = about.get("record", {})  # files of earlier versions hold none
        agent.record = FitRecord(**{name: int(known.get(name, 0)) for name in RECORDED})
    except RecsimError:
        raise
    except BROKEN as error:
        message = f"{directory} holds no agent that can be loaded ({error}); save it again with Agent.save"
        raise CheckpointError(message) from error
    return agent


class InformedAgent(Agent):
    """An agent that must `meet` the world before it is fitted: it shows what knowing the world would buy.

    It acts on observations alone, as every competitor does; only its learning is informed.
    """

    informed = True
    world: Any = None

    def meet(self, world: Any) -> Self:
        """Keeps the world to learn from; it is not saved."""
        self.world = world
        return self

    def required_world(self) -> Any:
        """The world.

        Raises:
            ConfigError: they have not met.
        """
        if self.world is None:
            raise ConfigError(f"{self.name} learns from the world itself; call meet(world) before fit")
        return self.world


class BackboneAgent(Agent):
    """An agent whose policy is the softmax of a backbone's logits, continued from the pretrained one.

    A subclass gives `batch_loss`, a function of one batch; the same loss on validation users is the `objective` that
    the kept state minimises.
    """

    config_type = FineTuningConfig
    policy: Backbone

    def batch_loss(self, policy: Backbone, batch: Batch, problem: "Problem") -> Tensor:
        """The mean loss of a batch, a scalar."""
        raise TypeError(f"{self.name} has no loss; an agent that learns must say what it minimises")

    def objective(self, policy: Backbone, batch: Batch, problem: "Problem") -> Tensor:
        """What the kept state minimises on validation users: the loss, unless an agent samples there."""
        return self.batch_loss(policy, batch, problem)

    def problem(self, histories: HistorySource, log: AnyLog, parts: "Parts") -> "Problem":
        """What the loss needs beside the batch, worked out once a log."""
        table = parts.rewards.on(log) if self.needs_ensemble and parts.rewards is not None else None
        return Problem(histories, parts.reference, table)

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        parts = required_parts(self, log, backbone, rewards)
        self.policy = copy.deepcopy(parts.reference).requires_grad_(True)
        train_log, held_out_log = split_logs(log, validation)
        seen, held_out = histories_of(train_log), histories_of(held_out_log)
        began = time.process_time()
        on_train = self.problem(seen, train_log, Parts(parts.reference, rewards, seed, "train"))
        on_validation = self.problem(held_out, held_out_log, Parts(parts.reference, rewards, seed, "validation"))
        prepared = time.process_time() - began
        record = train(
            self.policy,
            lambda batch: self.batch_loss(self.policy, batch, on_train),
            lambda: mean_loss(lambda batch: self.objective(self.policy, batch, on_validation), held_out),
            seen,
            self.config.training,
            seed,
            "fine-tuning",  # the same batches for every agent: paired comparisons share their noise
            after_check,
        )
        self.record = fit_record(record)
        self.record.preparation_seconds = prepared
        return self

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        return backbone_log_probs(self.policy, observations)

    def state(self) -> dict[str, Tensor]:
        return self.policy.state_dict()

    def shape(self) -> dict[str, Any]:
        return self.policy.shape()

    def restore(self, shape: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.policy = build_backbone(shape)
        self.policy.load_state_dict(state)
        self.policy.eval()


@dataclass(frozen=True)
class Parts:
    """What an agent is given to work with.

    Attributes:
        reference: π_ref, frozen.
        rewards: the ensemble, where the agent needs it.
        seed, purpose: of what a problem draws.
    """

    reference: Backbone
    rewards: RewardEnsemble | None
    seed: int = 0
    purpose: str = ""


@dataclass(frozen=True)
class Problem:
    """A log as a loss sees it.

    Attributes:
        histories: the log.
        reference: π_ref, frozen.
        table: r̂ on every prefix of the log, where the agent needs it.
        extra: tensors of the agent's own, a row a user.
    """

    histories: HistorySource
    reference: Backbone
    table: RewardTable | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


def required_parts(agent: Agent, log: AnyLog, backbone: Backbone | None, rewards: RewardEnsemble | None) -> Parts:
    """The backbone, frozen, and the ensemble.

    Raises:
        ConfigError: one that the agent needs is missing or belongs to another catalogue.
    """
    if backbone is None:
        raise ConfigError(f"{agent.name} continues a backbone; give fit(log, backbone) one from pretrain(log)")
    if agent.needs_ensemble and rewards is None:
        message = f"{agent.name} learns from a reward ensemble; give fit(log, backbone, rewards) one"
        raise ConfigError(f"{message} from fit_reward_ensemble(log, backbone)")
    for part in (backbone, rewards):
        if part is not None and part.n_titles != log.n_titles:
            kind = type(part).__name__
            raise ConfigError(f"the log has {log.n_titles} titles and the {kind} {part.n_titles}")
    reference = copy.deepcopy(backbone).eval().requires_grad_(False)
    return Parts(reference, rewards)


def require_catalogue(observations: Observations, n_titles: int) -> None:
    """Refuses contexts over another catalogue than the policy's, whose padding would be a title of it.

    Raises:
        ConfigError: names both sizes.
    """
    if observations.n_titles != n_titles:
        raise ConfigError(
            f"the policy is over {n_titles} titles, and the contexts that it is asked about over "
            f"{observations.n_titles}; both must come from one catalogue"
        )


def mean_loss(loss: Callable[[Batch], Tensor], histories: HistorySource) -> float:
    """The mean of a loss over all users of a log, weighted by events."""
    total, events = 0.0, 0
    for batch in histories.chunks():
        count = int(batch.valid.sum())
        total += loss(batch).item() * count
        events += count
    return total / events


def masked_mean(values: Tensor, batch: Batch) -> Tensor:
    """The mean of (B, T) values over real events, a scalar."""
    return (values * batch.valid).sum() / batch.valid.sum()


def normalised(weights: Tensor, batch: Batch) -> Tensor:
    """(B, T) weights of mean 1 over the real events of a batch; all 1 where they are all 0."""
    mean = masked_mean(weights, batch)
    return torch.where(mean > 0, weights / mean.clamp(min=1e-12), torch.ones_like(weights))


def fit_record(record: TrainingRecord, samples: int = 0) -> FitRecord:
    """The part of a training record that reports show."""
    return FitRecord(gradient_steps=record.steps, best_step=record.best_step, samples=samples)


@torch.no_grad()
def last_logits(
    score: Callable[[Tensor, Tensor, Tensor], Tensor], observations: Observations, n_titles: int, chunk: int = 512
) -> Tensor:
    """(n, I) scores of all titles after the whole histories, -inf where seen or not out yet.

    Args:
        score: titles, scores and times of histories to (B, I).
        observations: the contexts.
        n_titles: I, as ``score`` knows it.
        chunk: contexts at a time.

    Raises:
        ConfigError: contexts over another catalogue.
    """
    require_catalogue(observations, n_titles)
    parts = [torch.zeros(0, n_titles)]
    for start in range(0, len(observations), chunk):
        part = observations[slice(start, start + chunk)]
        logits = score(*tensors(part))
        parts.append(logits.masked_fill(torch.from_numpy(part.unavailable()), -torch.inf))
    return torch.cat(parts)


def backbone_log_probs(backbone: Backbone, observations: Observations) -> NDArray[np.float32]:
    """(n, I) log-softmax of a backbone's logits over the titles that can be chosen."""
    logits = last_logits(
        lambda *history: backbone.logits(backbone.encode_last(*history)), observations, backbone.n_titles
    )
    return torch.log_softmax(logits, dim=-1).numpy()
