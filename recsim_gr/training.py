"""One training loop for everything that learns from a log: warm-up, cosine decay, the best state on validation users.

Every agent, the pretraining and the reward ensemble go through `train`, so that "the same steps, batches, schedule and
early-stopping rule" is one piece of code and not a promise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import TrainingError
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.randomness import derived_seed, generator


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

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        for name in ("steps", "batch_users", "checks"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.learning_rate > 0, self, "learning_rate", "positive")
        for name in ("weight_decay", "warmup_steps"):
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
        steps: gradient steps taken.
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
) -> TrainingRecord:
    """Minimises ``loss`` over batches of users and leaves ``module`` in its best state on validation.

    Args:
        module: what is trained; its parameters are those optimised.
        loss: the mean loss of a batch, a scalar.
        objective: the objective on validation users, lower is better; called without gradients, in eval mode.
        histories: the training log.
        config: the schedule.
        seed, purpose: name the stream of the batches and of dropout.
        after_check: told every check's step and objective, for progress bars.
        parameter_groups: optimiser groups where parts learn at other rates (``scale``, a factor on the rate).

    Raises:
        TrainingError: a loss or an objective that is not finite.
    """
    batches = histories.batches(config.batch_users, generator(seed, f"batches of {purpose}"))
    groups = parameter_groups or [{"params": list(module.parameters())}]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    scales = [float(group.get("scale", 1.0)) for group in optimiser.param_groups]
    record = TrainingRecord(config.steps)
    record.notes(0, _measure(module, objective, purpose, 0))
    best = _copy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, f"dropout of {purpose}"))
        module.train()
        for step in range(config.steps):
            for group, scale in zip(optimiser.param_groups, scales, strict=True):
                group["lr"] = scale * config.learning_rate * config.rate(step)
            value = loss(next(batches))
            if not torch.isfinite(value):
                raise TrainingError(
                    f"{purpose} diverged: loss {value.item()} at step {step} of {config.steps}; "
                    f"lower its learning rate ({config.learning_rate})"
                )
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            optimiser.step()
            if config.is_check(step + 1):
                measured = _measure(module, objective, purpose, step + 1)
                if record.notes(step + 1, measured):
                    best = _copy(module)
                if after_check is not None:
                    after_check(step + 1, measured)
    module.load_state_dict(best)
    module.eval()
    return record


def _measure(module: nn.Module, objective: Callable[[], float], purpose: str, step: int) -> float:
    was_training = module.training
    module.eval()
    with torch.no_grad():
        value = float(objective())
    module.train(was_training)
    if not math.isfinite(value):
        raise TrainingError(f"{purpose} diverged: validation objective {value} after step {step}")
    return value


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
