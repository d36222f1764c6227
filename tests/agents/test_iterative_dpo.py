"""Iterative preference alignment: its loss is DPO's (test_losses.py); here are its rounds, where they lead in one
context, and the agent."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsim_gr.agents import Agent, IterativeDPO
from recsim_gr.agents.base import Problem
from recsim_gr.agents.iterative_dpo import _Rounds, round_starts
from recsim_gr.agents.rsdpo import PairAgent, drawn_pairs
from recsim_gr.backbones import HSTU
from recsim_gr.errors import ConfigError, TrainingError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts
from recsim_gr.prefixes import prefix_logits
from recsim_gr.rewards import RewardEnsemble
from recsim_gr.training import TrainingConfig

REF = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
R = torch.tensor([1.5, 4.0, 2.0, 5.0, 3.0], dtype=torch.float64)


# -- rounds -------------------------------------------------------------------------------------------------------


def test_rounds_begin_at_even_distances() -> None:
    assert round_starts(256, 3) == [0, 85, 171]
    assert round_starts(32, 1) == [0]
    assert round_starts(2, 5) == [0, 1]  # 0, .4, .8, 1.2 and 1.6 steps; 2 is the end


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 40))
def test_every_round_has_steps(steps: int, rounds: int) -> None:
    starts = round_starts(steps, rounds)
    lengths = np.diff([*starts, steps])
    assert starts[0] == 0
    assert lengths.sum() == steps
    assert lengths.min() >= 1
    if rounds <= steps:
        assert len(starts) == rounds
        assert lengths.max() - lengths.min() <= 2


@pytest.mark.parametrize(("option", "value"), [("rounds", 0), ("beta", 0.0), ("candidates", 1)])
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"IterativeDPOConfig\.{option} must be"):
        IterativeDPO(**{option: value})


# -- where they lead ----------------------------------------------------------------------------------------------


def one_round(reference: Tensor, share: Tensor, agent: IterativeDPO) -> Tensor:
    """log π at the lowest loss over all pairs of five titles, (winner, loser) as often as it says."""
    winner, loser = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([x], max_iter=2_000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        own = torch.log_softmax(x, dim=0)
        losses = agent.pair_loss(own[winner], own[loser], reference[winner], reference[loser])
        loss = (share.flatten() * losses).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.log_softmax(x.detach(), dim=0)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_each_round_tilts_the_last(rounds: int) -> None:
    """Labels of Bradley-Terry, all pairs: π = π_ref·exp(n·r/β)/Z after n rounds."""
    agent, share = IterativeDPO(beta=2.0), torch.sigmoid(R[:, None] - R)
    found = REF.log()
    for _ in range(rounds):
        found = one_round(found, share, agent)
    tilted = REF * torch.exp(rounds * R / 2.0)
    torch.testing.assert_close(found.exp(), tilted / tilted.sum(), atol=1e-5, rtol=0)


# -- the run ------------------------------------------------------------------------------------------------------


def test_one_round_is_rsdpo_without_intervals(
    make: Callable[..., Agent], log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, contexts: Contexts
) -> None:
    """The same draws, steps and kept state, bit for bit; with three rounds it is something else."""
    training = TrainingConfig(steps=6, batch_users=32, warmup_steps=1, checks=2)
    one, rsdpo, three = (
        make(name, training=training, **options).fit(log, backbone, rewards)
        for name, options in (("IterativeDPO", {"rounds": 1}), ("RSDPO", {"interval": 0.0}), ("IterativeDPO", {}))
    )
    answers = [agent.log_probs(contexts.observations) for agent in (one, rsdpo, three)]
    np.testing.assert_array_equal(answers[0], answers[1])
    assert one.record == rsdpo.record
    assert not np.array_equal(answers[0], answers[2])
    assert three.record.gradient_steps == 6
    assert three.record.preparation_seconds > one.record.preparation_seconds > 0


def begun(agent: IterativeDPO, log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> _Rounds:
    """A run before its first step, on the log for training and on its first thirty users for validation."""
    agent.policy = HSTU(backbone.config, 30)
    agent.policy.load_state_dict(backbone.state_dict())
    parts = {"train": log, "validation": log.rows(slice(0, 6 * 30))}
    problems = {name: Problem(Histories(part), backbone, rewards.on(part)) for name, part in parts.items()}
    return _Rounds(agent, problems, seed=0)


def test_a_round_draws_from_the_policy_and_is_held_to_it(
    log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    agent = IterativeDPO(training=TrainingConfig(steps=4), rounds=2, candidates=3)
    rounds = begun(agent, log, backbone, rewards)
    problem = rounds.problems["train"]
    batch = next(problem.histories.chunks())
    first = {name: value.clone() for name, value in problem.extra.items()}
    assert problem.table is not None
    for step in range(3):
        if step == 2:  # the third step is the first of the second round; by then the policy is another
            agent.policy = HSTU(backbone.config, 30).train()
        rounds.loss(batch)
        same = torch.equal(problem.extra["titles"], first["titles"])
        assert same == (step < 2)
    assert agent.policy.training
    with torch.no_grad():
        agent.policy.eval()
        logits = prefix_logits(agent.policy, batch)
    second = {name: value[batch.rows] for name, value in problem.extra.items()}
    torch.testing.assert_close(second["reference"], logits.gather(-1, second["titles"]))
    assert rounds.number == 1
    # the winner is the better one by the ensemble, and every context whose two differ counts
    mean = problem.table.mean(batch.rows).gather(-1, second["titles"])
    assert torch.equal(second["kept"], (mean[..., 0] > mean[..., 1]) & batch.valid)
    assert 0.2 < second["kept"].float().mean() < 1.0


def test_the_objective_does_not_notice_a_new_round(
    log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    """log 2 at the start; down in the first round; the same on both sides of the border; down further in the second,
    by as much as the loss of its own pairs falls below log 2."""
    agent = IterativeDPO(training=TrainingConfig(steps=20), rounds=2)
    rounds = begun(agent, log, backbone, rewards)
    optimiser = torch.optim.Adam(agent.policy.parameters(), lr=5e-3)
    agent.policy.eval()
    batch, seen = next(rounds.problems["train"].histories.chunks()), [rounds.objective()]
    for step in range(20):
        if step == 10:
            before = rounds.objective()
            with torch.no_grad():
                rounds.loss(batch)
            rounds.steps -= 1
            assert rounds.number == 1
            assert rounds.objective() == pytest.approx(before, abs=1e-5)
            seen.append(before)
            rounds.starts = rounds.starts[:1]  # the border is behind us
        optimiser.zero_grad()
        rounds.loss(batch).backward()
        optimiser.step()
    seen.append(rounds.objective())
    own = rounds.objective() - rounds.offset
    assert seen[0] == pytest.approx(math.log(2), abs=1e-6)
    assert seen[1] < seen[0] - 0.01
    assert seen[2] < seen[1] - 0.01
    assert seen[2] - seen[1] == pytest.approx(own - math.log(2), abs=1e-5)


def test_chunks_without_a_pair_do_not_move_the_objective(
    log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loss is 0, not log 2: it must cancel at the border, or later rounds would look better for nothing."""

    def without(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        pairs = drawn_pairs(*arguments, **named)
        return pairs | {"kept": torch.zeros_like(pairs["kept"])}

    monkeypatch.setattr("recsim_gr.agents.iterative_dpo.drawn_pairs", without)
    agent = IterativeDPO(training=TrainingConfig(steps=4), rounds=2)
    rounds = begun(agent, log, backbone, rewards)
    batch = next(rounds.problems["train"].histories.chunks())
    for _ in range(4):
        assert rounds.loss(batch).item() == 0.0
    assert rounds.number == 1
    assert rounds.objective() == 0.0


@pytest.mark.parametrize("name", ["RSDPO", "RSIPO", "IterativeDPO"])
def test_rewards_that_are_nan_are_no_lack_of_pairs(
    name: str, make: Callable[..., Agent], log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble
) -> None:
    broken = copy.deepcopy(rewards)
    with torch.no_grad():
        broken.members[0].head.mean.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(TrainingError, match="r̂ is NaN or infinite"):
        make(name).fit(log, backbone, broken)


def test_what_learns_from_pairs_must_say_how(backbone: HSTU) -> None:
    class Silent(PairAgent):
        name = "Silent"

    with pytest.raises(TypeError, match="Silent has no loss"):
        Silent().pair_loss(*torch.zeros(4, 3))
