"""One training loop for everything that learns from a log: warm-up, cosine decay, the best state on validation users.

Every agent, the pretraining and the reward ensemble go through `train`, so that "the same steps, batches, schedule and
early-stopping rule" is one piece of code and not a promise.

A run that diverged is an error (`TrainingError`) and no result. It did, where

- a loss or a validation objective is not finite; or
- a loss that should fall (``falls``: imitation, squared error) ended above its start. Its start is the mean over the
  first `START_BATCHES` batches at the initial weights, dropout included; its end is the mean over the steps since the
  last check but one, and at most the last quarter of the run. Above means by more than `NOISE` standard errors of that
  difference, by the batches' spread at the start, and by more than `LEAST_RISE` of the start.

The validation objective does not say it: it may rise while the loss falls, which is overfitting, and then the state
that was best before is kept. Nor does a loss that moves with what is learned (a policy's, a Q function's).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from recsim_gr.checkpoints import BROKEN, checkpoint_exists, read_checkpoint, tensors_under, write_checkpoint
from recsim_gr.configs import require, require_finite_numbers, to_dict
from recsim_gr.devices import (
    PRECISIONS,
    autocast_dtype,
    random_numbers_kept,
    random_states,
    resolve_device,
    set_random_states,
)
from recsim_gr.errors import CheckpointError, ConfigError, TrainingError
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.randomness import derived_seed, generator

START_BATCHES = 8
"""Enough to tell the spread of a batch's loss to a quarter; evaluated without gradients, they take as long as three
steps."""

NOISE = 5.0
"""Standard errors: with eight batches a run that learns nothing at all passes them once in 1,300 times (Student's t,
7 degrees of freedom)."""

LEAST_RISE = 0.01
"""Share of the start: what starts at its optimum ends a little above it, since every step has its noise."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast something is trained."""

    steps: int = 256
    """Gradient steps: four passes over 4,000 users at 64 a batch, and eight rollouts of PPO."""
    batch_users: int = 64
    """Users a batch, all their prefixes at once: with 20 events 1,280 contexts. Larger batches learn little but
    popularity in the same time."""
    learning_rate: float = 3e-3
    """Peak rate of AdamW; a third of the pretraining's, since the agents start from what it learned."""
    weight_decay: float = 0.01
    """AdamW's default."""
    warmup_steps: int = 30
    """Linear warm-up, about a tenth of the default run; the rest decays as a cosine to 0."""
    checks: int = 4
    """How often the validation objective is measured, at even distances, the last time at the end; the state with
    the lowest is kept, and the start counts as a state."""
    patience: int = 0
    """Checks in a row without a lower objective, after which a run stops; 0 runs to the end: the rate falls to 0 there,
    so the best state comes late, and learners that are compared take the same number of steps."""
    precision: str = "float32"
    """Of products while training, one of `PRECISIONS`; weights, optimiser and validation are float32 always. Runs on
    two machines must differ in no more than the rounding of float32 sums, and ``auto`` is something else on another.
    With native products bfloat16 takes .68 of the time of a step at d = 64, 1,000 titles, 128 × 50 tokens, and 1.16 of
    it at d = 32, 200 titles, 64 × 20, where conversions cost more than products; runs end at the same likelihood."""
    compile: bool = False
    """Whether the loss goes through ``torch.compile``, which takes a C++ compiler. On a CPU it does not pay: one to one
    and a half minutes of compilation, and then 1.6 to 2.7 times as long a step, since what is compiled are the plain
    equations, without our own backward passes. Measured as precision was, by
    ``pytest -m benchmark -s tests/benchmarks/test_training_precision.py``."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        for name in ("steps", "batch_users", "checks"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.precision in PRECISIONS, self, "precision", f"one of {', '.join(PRECISIONS)}")
        require(isinstance(self.compile, bool), self, "compile", "true or false")
        require(self.learning_rate > 0, self, "learning_rate", "positive")
        for name in ("weight_decay", "warmup_steps", "patience"):
            require(getattr(self, name) >= 0, self, name, "0 or more")

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the peak."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))

    def is_check(self, done: int) -> bool:
        """Whether the validation objective is measured after ``done`` steps."""
        marks = {round(self.steps * k / self.checks) for k in range(1, self.checks + 1)}
        return done in marks


@dataclass
class TrainingRecord:
    """What a training run did.

    Attributes:
        steps: gradient steps taken; fewer than planned where ``patience`` ended the run.
        best_step: after how many of them the kept state stood; 0 is the start.
        best_objective: the validation objective there, lower is better.
        objectives: (step, validation objective) along the run.
    """

    steps: int
    best_step: int = 0
    best_objective: float = math.inf
    objectives: list[tuple[int, float]] = field(default_factory=list)

    def notes(self, step: int, objective: float) -> bool:
        """Writes an objective down; whether it is the lowest so far."""
        self.objectives.append((step, objective))
        if objective < self.best_objective:
            self.best_step, self.best_objective = step, objective
            return True
        return False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, through JSON; infinities, which are no JSON, may be null there."""
        objectives = [(int(step), float(value)) for step, value in values["objectives"]]
        best = math.inf if values["best_objective"] is None else float(values["best_objective"])
        return cls(int(values["steps"]), int(values["best_step"]), best, objectives)


class TrainingObserver(Protocol):
    """What is told how a run goes on: `recsim_gr.progress.TrainingProgress`, say."""

    def on_step(self, step: int, loss: float, tokens: int) -> None:
        """``step`` steps are done, the last one with that loss over that many events."""

    def on_check(self, step: int, objective: float) -> None:
        """The validation objective after ``step`` steps."""


def train(
    module: nn.Module,
    loss: Callable[[Batch], Tensor],
    objective: Callable[[], float],
    histories: HistorySource,
    config: TrainingConfig,
    seed: int,
    purpose: str,
    after_check: Callable[[int, float], None] | None = None,
    parameter_groups: list[dict[str, object]] | None = None,
    *,
    falls: bool = False,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: TrainingObserver | None = None,
) -> TrainingRecord:
    """Minimises ``loss`` over batches of users and leaves ``module`` in its best state on validation.

    Args:
        module: what is trained; its parameters are those optimised.
        loss: the mean loss of a batch, a scalar; the batch is on the device.
        objective: the objective on validation users, lower is better; called without gradients, in eval mode.
        histories: the training log.
        config: the schedule.
        seed, purpose: name the stream of the batches and of dropout.
        after_check: told every check's step and objective, for progress bars.
        parameter_groups: optimiser groups where parts learn at other rates (``scale``, a factor on the rate).
        falls: whether the loss should end below its start, so that it is an error if it does not.
        device: where it is trained, and stays; by default where the module is.
        checkpoint: a directory in which the run is kept at every check, and from which it goes on where it was cut
            off: it then ends as it would have ended, bit for bit, on the same device with the same version of torch and
            as many threads.
        identity: whatever else decides the result, as JSON values: a checkpoint with another one is refused.
        progress: told every step and check.

    Raises:
        ConfigError: no such device; or a loss that cannot be compiled.
        TrainingError: it diverged, see the module.
        CheckpointError: the checkpoint is damaged, or that of another run: says what differs.
        RunDirectoryError: the checkpoint cannot be written.
    """
    place = _device_of(module) if device is None else resolve_device(device)
    module.to(place)
    run = _Run(module, loss, objective, histories, config, seed, purpose, parameter_groups, place)
    told: list[Callable[[int, float], None]] = [] if progress is None else [progress.on_check]
    told += [] if after_check is None else [after_check]
    keeper = None if checkpoint is None else _Keeper(Path(checkpoint), run, identity or {})
    with random_numbers_kept(place):
        if keeper is None or not keeper.restore():
            run.begin(judged=falls)
        batches = run.batches()
        while not run.finished:
            batch = next(batches)
            value = run.step(batch)
            if progress is not None:
                progress.on_step(run.record.steps, value, int(batch.valid.sum()))
            if not config.is_check(run.record.steps):
                continue
            measured = run.check()
            if keeper is not None:
                keeper.keep()
            for tell in told:
                tell(run.record.steps, measured)
    module.load_state_dict(run.best)
    module.eval()
    return run.record


class _Run:
    """A training run between two steps; arguments as for `train`.

    Attributes:
        record: what it did so far.
        best: the state of the module that is best so far.
        start: mean and standard deviation of the loss of a batch at the start, where it is to fall.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Batch], Tensor],
        objective: Callable[[], float],
        histories: HistorySource,
        config: TrainingConfig,
        seed: int,
        purpose: str,
        groups: list[dict[str, object]] | None,
        device: torch.device,
    ) -> None:
        self.module, self.objective, self.histories = module, objective, histories
        self.config, self.seed, self.purpose, self.device = config, seed, purpose, device
        self.plain_loss = loss
        self.loss: Callable[[Batch], Tensor] = torch.compile(loss) if config.compile else loss
        self.optimiser = torch.optim.AdamW(
            groups or [{"params": list(module.parameters())}],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._scales = [float(group.get("scale", 1.0)) for group in self.optimiser.param_groups]
        self._dtype = autocast_dtype(config.precision, device)
        self.record = TrainingRecord(0)
        self.best: dict[str, Tensor] = {}
        self.start: tuple[float, float] | None = None
        self._first: list[Batch] = []
        self._losses: deque[float] = deque(maxlen=max(1, config.steps // 4))

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or the run has lost its patience."""
        steps, patience = self.record.steps, self.config.patience
        worse = sum(step > self.record.best_step for step, _ in self.record.objectives)
        return steps >= self.config.steps or 0 < patience <= worse

    def begin(self, judged: bool) -> None:
        """Measures where it starts, and seeds dropout."""
        self.record.notes(0, self._measure())
        self.best = _copy(self.module)
        torch.manual_seed(derived_seed(self.seed, f"dropout of {self.purpose}"))
        self.module.train()
        if not judged:
            return
        self._first = list(islice(self.batches(), START_BATCHES))
        with torch.no_grad(), random_numbers_kept(self.device), self._autocast():
            losses = torch.stack([self.plain_loss(batch.to(self.device)) for batch in self._first]).double()
        self.start = float(losses.mean()), float(losses.std())

    def batches(self) -> Iterator[Batch]:
        """Those that are still to come."""
        rng = generator(self.seed, f"batches of {self.purpose}")
        first, self._first = self._first, []
        rest = self.histories.batches(self.config.batch_users, rng, self.record.steps + len(first))
        return chain(first, rest)

    def step(self, batch: Batch) -> float:
        """One step; the loss that it found."""
        step, config = self.record.steps, self.config
        for group, scale in zip(self.optimiser.param_groups, self._scales, strict=True):
            group["lr"] = scale * config.learning_rate * config.rate(step)
        with self._autocast():
            value = self._compiled(batch.to(self.device)) if config.compile else self.loss(batch.to(self.device))
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        self.optimiser.step()
        found = value.item()  # behind all else: a device is waited for once a step
        if not math.isfinite(found):
            raise TrainingError(
                f"{self.purpose} diverged: loss {found} at step {step} of {config.steps}; "
                f"lower its learning rate ({config.learning_rate})"
            )
        self.record.steps += 1
        self._losses.append(found)
        return found

    def check(self) -> float:
        """Measures the objective and keeps the state if it is the best; at the end, judges the loss."""
        measured = self._measure()
        if self.record.notes(self.record.steps, measured):
            self.best = _copy(self.module)
        if self.finished and self.start is not None:
            self._judge(*self.start)
        self._losses.clear()
        return measured

    def _judge(self, start: float, deviation: float) -> None:
        n = len(self._losses)
        end, config = sum(self._losses) / n, self.config
        error = deviation * math.sqrt(1 / START_BATCHES + 1 / n)
        if end - start > max(NOISE * error, LEAST_RISE * abs(start)):
            raise TrainingError(
                f"{self.purpose} diverged: its loss was {start:.4g} at the start and {end:.4g} over the last {n} of "
                f"{self.record.steps} steps; lower its learning rate ({config.learning_rate}) or raise its warm-up "
                f"({config.warmup_steps} steps)"
            )

    def _measure(self) -> float:
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad():
            value = float(self.objective())
        self.module.train(was_training)
        if not math.isfinite(value):
            raise TrainingError(f"{self.purpose} diverged: validation objective {value} after step {self.record.steps}")
        return value

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def _compiled(self, batch: Batch) -> Tensor:
        try:
            return self.loss(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            message = f"TrainingConfig.compile: torch.compile failed here ({reason}); leave it off"
            raise ConfigError(message) from error


# -- keeping a run -----------------------------------------------------------------------------------------------

NAME = "training"
"""Of the checkpoint's files."""


class _Keeper:
    """Keeps a run in a directory.

    Args:
        directory: where.
        run: the run, not begun.
        identity: what decides its result beside what the run itself says.
    """

    def __init__(self, directory: Path, run: _Run, identity: dict[str, Any]) -> None:
        self.directory, self.run = directory, run
        self.identity: dict[str, Any] = {
            "purpose": run.purpose,
            "seed": int(run.seed),
            "training": to_dict(run.config),
            "log": run.histories.fingerprint,
            "device": run.device.type,
            **identity,
        }

    def keep(self) -> None:
        """Writes the run as it stands."""
        run = self.run
        states = run.optimiser.state_dict()["state"]
        tensors = _named("module", run.module.state_dict()) | _named("best", run.best)
        for index, state in states.items():
            tensors |= _named(f"optimiser.{index}", state)
        tensors |= _named("random", random_states(run.device))
        start = None if run.start is None else list(run.start)
        about = {"identity": self.identity, "record": asdict(run.record), "start": start, "torch": torch.__version__}
        write_checkpoint(self.directory, NAME, about, tensors)

    def restore(self) -> bool:
        """Brings the run to where it was left; false where there is nothing to go on from.

        Raises:
            CheckpointError: what is there is damaged, or another run.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is a file; a checkpoint takes a directory")
        if not checkpoint_exists(self.directory, NAME):
            return False
        about, tensors = read_checkpoint(self.directory, NAME)
        try:
            self._refuse_others(about["identity"])
            self._load(about, tensors)
        except CheckpointError:
            raise
        except BROKEN as error:
            raise CheckpointError(
                f"{self.directory} holds no training that can go on ({error}); remove it, or give another directory"
            ) from error
        return True

    def _refuse_others(self, theirs: dict[str, Any]) -> None:
        ours, theirs = _flat(self.identity), _flat(theirs)
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or ours[name] != theirs[name]:
                there, here = theirs.get(name), ours.get(name)
                raise CheckpointError(
                    f"{self.directory} is the checkpoint of another run: {name} is {there!r} there and {here!r} here; "
                    "give another directory, or remove this one"
                )

    def _load(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        run = self.run
        record = TrainingRecord.from_json(about["record"])
        if not 0 <= record.steps <= run.config.steps:
            raise ValueError(f"{record.steps} steps of {run.config.steps} cannot have been taken")
        start = about["start"]
        best = {name: value.to(run.device) for name, value in tensors_under("best.", tensors).items()}
        run.module.load_state_dict(best)  # refuses what is of another shape
        run.module.load_state_dict(tensors_under("module.", tensors))
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors_under("optimiser.", tensors).items():
            index, key = name.split(".", 1)
            states.setdefault(int(index), {})[key] = value
        groups = run.optimiser.state_dict()["param_groups"]
        parameters = [parameter for group in run.optimiser.param_groups for parameter in group["params"]]
        for number, state in states.items():
            shape = parameters[number].shape
            if state["exp_avg"].shape != shape or state["exp_avg_sq"].shape != shape or state["step"].numel() != 1:
                raise ValueError(f"the optimiser's moments of parameter {number} are not {tuple(shape)}")
        run.optimiser.load_state_dict({"state": states, "param_groups": groups})
        run.record, run.best = record, best
        run.start = None if start is None else (float(start[0]), float(start[1]))
        run.module.train()
        set_random_states(run.device, tensors_under("random.", tensors))


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
