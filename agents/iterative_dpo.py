"""Iterative preference alignment, OneRec's (arXiv:2502.18965): rounds of DPO on titles that the policy draws itself.

In each round titles are drawn from the *current* policy, the best and the worst of them by the reward model make a
pair, and DPO (arXiv:2305.18290, eq. 7) is held to the policy as it stood at the start of the round. Without a filter:
every context whose best and worst differ has its pair. OneRec takes whole sessions from beams; a session is one title
here, and titles are drawn, so that a pair comes up as often as the policy makes that choice.

The steps of ``training`` are split over the rounds in one schedule: optimiser and learning rate go on from round to
round, so that the agent differs from `RSDPO` by its pairs and references alone; with one round, and no interval there,
the two are the same.

Which state is kept: losses of different rounds are of different pairs and cannot be compared. Every round starts with
the policy at its own reference, where the loss is log 2, so what can be compared is how far the rounds have brought it
down. The objective is the sum over rounds of (validation loss − what it was when the round began), plus log 2. A new
round changes nothing of it, and in a single round it is the loss.

Optimum in tabular contexts, Bradley-Terry labels, full coverage: π = π_ref·exp(n·r/β)/Z after n rounds.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from recsim_gr.agents.base import (
    AfterCheck,
    FineTuningConfig,
    Parts,
    Problem,
    Strength,
    fit_record,
    mean_loss,
    register,
    required_parts,
)
from recsim_gr.agents.rsdpo import PairAgent, dpo_loss, drawn_pairs
from recsim_gr.backbones import Backbone
from recsim_gr.configs import require
from recsim_gr.histories import Batch, histories_of, split_logs
from recsim_gr.log import AnyLog
from recsim_gr.randomness import derived_seed
from recsim_gr.rewards import RewardEnsemble
from recsim_gr.training import train


@dataclass(frozen=True)
class IterativeDPOConfig(FineTuningConfig):
    """How many rounds, and how strongly pairs count."""

    rounds: int = 3
    """Iterative DPO as it was first reported had three (arXiv:2401.10020, as its abstract has it); OneRec's abstract
    names no number."""
    beta: float = 0.1
    """β of DPO, in each round: `RSDPO`'s."""
    candidates: int = 8
    """Titles drawn for each context in each round: `RSDPO`'s."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 1, self, "rounds", "at least 1")
        require(self.beta > 0, self, "beta", "positive")
        require(self.candidates >= 2, self, "candidates", "at least 2")


@register
class IterativeDPO(PairAgent):
    """Rounds of DPO on the best and the worst of what the policy itself draws."""

    name = "IterativeDPO"
    config_type = IterativeDPOConfig
    strength = Strength("beta")

    def pair_loss(self, winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor) -> Tensor:
        return dpo_loss(winner, loser, winner_ref, loser_ref, self.config.beta)

    def fit(
        self,
        log: AnyLog,
        backbone: Backbone | None = None,
        rewards: RewardEnsemble | None = None,
        validation: AnyLog | None = None,
        seed: int = 0,
        after_check: AfterCheck | None = None,
    ) -> Self:
        reference = required_parts(self, log, backbone, rewards).reference
        self.policy = copy.deepcopy(reference).requires_grad_(True)
        problems = {}
        for purpose, part in zip(("train", "validation"), split_logs(log, validation), strict=True):
            problems[purpose] = self.problem(histories_of(part), part, Parts(reference, rewards, seed, purpose))
        rounds = _Rounds(self, problems, seed)
        record = train(
            self.policy,
            rounds.loss,
            rounds.objective,
            problems["train"].histories,
            self.config.training,
            seed,
            "fine-tuning",
            after_check,
        )
        self.record = fit_record(record)
        self.record.preparation_seconds = rounds.seconds
        return self


def round_starts(steps: int, rounds: int) -> list[int]:
    """After how many steps each round begins: at even distances, the first at 0; none is empty."""
    return sorted({round(steps * k / rounds) for k in range(rounds)} - {steps})


class _Rounds:
    """The rounds of a run: they begin where the loss is asked for the first time after enough steps.

    Args:
        agent: with its policy, which is in training.
        problems: of the ``train`` and the ``validation`` log; their pairs are drawn here.
        seed: of the draws.

    Attributes:
        number: of the round.
        offset: what the objective is above the validation loss of the current pairs.
        seconds: processor time spent on drawing pairs.
    """

    def __init__(self, agent: IterativeDPO, problems: dict[str, Problem], seed: int) -> None:
        self.agent, self.problems, self.seed = agent, problems, seed
        self.starts = round_starts(agent.config.training.steps, agent.config.rounds)
        self.number, self.steps, self.offset, self.seconds = 0, 0, 0.0, 0.0
        self._evaluating(self._draw)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch of the training log; one call is one step."""
        if self.steps in self.starts[1:]:
            self._evaluating(self._next)
        self.steps += 1
        return self.agent.batch_loss(self.agent.policy, batch, self.problems["train"])

    def objective(self) -> float:
        """See the module."""
        return self.offset + self._validation_loss()

    def _next(self) -> None:
        """The policy as it stands becomes the reference of a new round; the objective does not notice."""
        end = self._validation_loss()
        self.number += 1
        self._draw()
        self.offset += end - self._validation_loss()

    def _draw(self) -> None:
        for purpose, problem in self.problems.items():
            assert problem.table is not None
            later = f" in round {self.number}" if self.number > 0 else ""
            seed = derived_seed(self.seed, f"candidates on {purpose}{later}")
            drawn = (self.agent.policy, problem.histories, problem.table, self.agent.config.candidates)
            problem.extra.update(drawn_pairs(*drawn, width=0.0, seed=seed))

    def _validation_loss(self) -> float:
        problem = self.problems["validation"]
        return mean_loss(lambda batch: self.agent.batch_loss(self.agent.policy, batch, problem), problem.histories)

    def _evaluating(self, work: Callable[[], None]) -> None:
        """Does it without dropout, and with the clock on."""
        policy, began = self.agent.policy, time.process_time()
        was_training = policy.training
        policy.eval()
        with torch.no_grad():
            work()
        policy.train(was_training)
        self.seconds += time.process_time() - began
