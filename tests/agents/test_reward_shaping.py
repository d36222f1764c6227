"""What PPO and GRPO are paid: by hand, limits, gradients, invariances; on the tables of an ensemble; in the agents."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr.agents import GRPO, PPO
from recsim_gr.agents.base import backbone_log_probs
from recsim_gr.agents.ppo import penalised_reward
from recsim_gr.agents.reward_shaping import (
    ShapedRewardConfig,
    ShapedRewards,
    ShapedTable,
    bounded,
    shaped_rewards,
    uncertainty_weighted,
)
from recsim_gr.backbones import HSTU
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories, split_logs
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts, Observations
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the shapes themselves ----------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """4 − 2·½² = 3.5. With W = 4 and r − c = ln 3: 4σ(ln 3) = 3; at the centre 2. W = 2 and ½ ln 3: 2σ(ln 3) = 1.5."""
    got = uncertainty_weighted(torch.tensor([4.0, 1.0]), torch.tensor([0.5, 0.0]), 2.0)
    np.testing.assert_allclose(got, [3.5, 1.0])
    log3 = float(np.log(3))
    np.testing.assert_allclose(bounded(torch.tensor([5.0 + log3, 5.0]), torch.tensor(5.0), 4.0), [3.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(bounded(torch.tensor([0.5 * log3]), torch.tensor(0.0), 2.0), [1.5], rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: uncertainty_weighted(torch.zeros(2, 3), torch.zeros(3), 1.0),
        lambda: bounded(torch.zeros(3), torch.zeros(2, 3), 4.0),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()


def test_limits() -> None:
    """Without a weight the mean; with W → ∞ the centred reward and half the width."""
    rewards, deviation = random_rows(0, 2, 3), random_rows(1, 2, 3).abs()
    assert torch.equal(uncertainty_weighted(rewards, deviation, 0.0), rewards)
    wide = bounded(rewards, torch.tensor(0.3), 1e5) - 0.5e5
    torch.testing.assert_close(wide, rewards - 0.3, atol=1e-6, rtol=0)


def test_gradients() -> None:
    """−2·weight·deviation; and 4·σ·(1 − σ), which is 1 at the centre."""
    rewards, deviation = random_rows(0, 2, 3).requires_grad_(), random_rows(1, 2, 3).abs().requires_grad_()
    assert gradcheck(lambda r, d: uncertainty_weighted(r, d, 0.7), (rewards, deviation))
    uncertainty_weighted(rewards, deviation, 0.7).sum().backward()
    torch.testing.assert_close(deviation.grad, -1.4 * deviation.detach())
    centre = torch.zeros(2, 1, dtype=torch.float64)
    assert gradcheck(lambda r: bounded(r, centre, 3.0), (rewards,))
    at_centre = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    bounded(at_centre, torch.tensor(0.0), 3.0).backward()
    assert at_centre.grad is not None
    assert at_centre.grad.item() == pytest.approx(1.0)


@PROPERTY
@given(st.floats(-5, 5), st.floats(0.5, 8), st.integers(0, 99))
def test_a_bounded_reward_keeps_order_and_range_and_feels_no_level(shift: float, width: float, seed: int) -> None:
    rewards = random_rows(seed, 8).sort().values
    got = bounded(rewards, rewards.mean(), width)
    assert (got.diff() >= 0).all()
    assert (got > 0).all()
    assert (got < width).all()
    torch.testing.assert_close(bounded(rewards + shift, rewards.mean() + shift, width), got, atol=1e-9, rtol=0)


# -- on an ensemble's tables --------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {"reward": "worst"},
    {"reward": "uncertainty", "uncertainty_weight": 3.0},
    {"bound": 2.0},
    {"reward": "worst", "bound": 1.0},
]


def one_context(
    options: dict[str, Any], seen: Observations, reference: HSTU, rewards: RewardEnsemble
) -> np.ndarray[Any, Any]:
    """(I,) shaped rewards, worked out from the members."""
    history = [torch.from_numpy(np.ascontiguousarray(x)) for x in (seen.titles, seen.scores, seen.times)]
    with torch.no_grad():
        each = torch.stack([member(*history) for member in rewards.members])[:, 0].double().numpy()
    kind = options.get("reward", "mean")
    value = each.min(axis=0) if kind == "worst" else each.mean(axis=0)
    if kind == "uncertainty":
        value = value - options["uncertainty_weight"] * each.var(axis=0, ddof=1)
    if "bound" in options:
        policy = np.exp(backbone_log_probs(reference, seen)[0].astype(np.float64))
        width = options["bound"]
        value = width / (1 + np.exp(-4 * (value - policy @ value) / width))
    return np.asarray(value)


@pytest.mark.parametrize("options", SHAPES)
def test_shaped_tables(options: dict[str, Any], log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble) -> None:
    """Against one context at a time, all titles and one of them."""
    part = log.rows(slice(0, 30))
    table = shaped_rewards(rewards, ShapedRewardConfig(**options), backbone).on(part)
    whole = part.sequences()
    everyone = table.mean(torch.arange(5))
    plain = rewards.on(part).mean(torch.arange(5))
    assert (everyone - plain).abs().max() > 1e-3
    for row in range(5):
        for step in (0, 2, 5):
            one = slice(row, row + 1)
            past = whole.titles[one, :step], whole.scores[one, :step], whole.times[one, :step]
            seen = Observations(*past, np.array([step]), whole.epoch[one], whole.n_titles)
            expected = one_context(options, seen, backbone, rewards)
            np.testing.assert_allclose(everyone[row, step], expected, atol=1e-3)
            titles = np.array([3, 17, 29])
            found = table.at(np.full(3, row), np.full(3, step), titles)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[titles], atol=1e-3)


def test_nothing_shaped_is_the_ensemble_itself(backbone: HSTU, rewards: RewardEnsemble) -> None:
    """So that PPO without options is what it was, bit for bit."""
    assert shaped_rewards(rewards, ShapedRewardConfig(), backbone) is rewards
    assert shaped_rewards(rewards, ShapedRewardConfig(uncertainty_weight=3.0), backbone) is rewards
    shaped = shaped_rewards(rewards, ShapedRewardConfig(bound=4.0), backbone)
    assert isinstance(shaped, ShapedRewards)
    assert shaped.n_titles == 30


def test_the_appended_form_has_a_deviation_but_no_members(log: InteractionLog, backbone: HSTU, training: Any) -> None:
    few = log.rows(slice(0, 120))
    config = RewardEnsembleConfig(members=2, form="appended", training=training)
    ensemble = fit_reward_ensemble(few, backbone, config)
    rows, steps, titles = np.array([0, 4]), np.array([0, 3]), np.array([3, 8])
    options = {"reward": "uncertainty", "uncertainty_weight": 3.0}
    table = shaped_rewards(ensemble, ShapedRewardConfig(**options), backbone).on(few)  # type: ignore[arg-type]
    everyone = table.mean(torch.from_numpy(rows))
    np.testing.assert_allclose(table.at(rows, steps, titles), everyone[[0, 1], steps, titles], rtol=1e-6)
    plain = ensemble.on(few)
    expected = plain.mean(torch.from_numpy(rows)) - 3 * plain.deviation(torch.from_numpy(rows)) ** 2
    torch.testing.assert_close(everyone, expected)
    worst = shaped_rewards(ensemble, ShapedRewardConfig(reward="worst"), backbone).on(few)
    for ask in (lambda: worst.mean(torch.arange(2)), lambda: worst.at(rows, steps, titles)):
        with pytest.raises(ConfigError, match=r'DenseTable holds the members.*form="shallow"'):
            ask()


# -- in the agents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PPO, partial(PPO, fast=True), GRPO], ids=["PPO", "fast PPO", "GRPO"])
@pytest.mark.parametrize("options", SHAPES[:3])
def test_agents_climb_what_they_are_paid(
    kind: Any,
    options: dict[str, Any],
    log: InteractionLog,
    backbone: HSTU,
    rewards: RewardEnsemble,
    contexts: Contexts,
    training: Any,
) -> None:
    """Each ends elsewhere than on the plain mean, and higher in its own reward than where it started."""
    plain, shaped = (kind(training=training, **given).fit(log, backbone, rewards) for given in ({}, options))
    unseen = ~contexts.observations.seen()
    one, other = (agent.log_probs(contexts.observations)[unseen] for agent in (plain, shaped))
    assert np.abs(one - other).max() > 1e-3
    table = shaped_rewards(rewards, shaped.config, backbone).on(log)
    before, after = (penalised_reward(p, backbone, Histories(log), table, 0.0) for p in (backbone, shaped.policy))
    assert after > before + 0.03


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("options", SHAPES)
def test_what_ppo_draws_is_paid_the_shaped_reward(
    fast: bool, options: dict[str, Any], log: InteractionLog, backbone: HSTU, rewards: RewardEnsemble, training: Any
) -> None:
    """And what it is kept by: the shaped reward on validation users, which at the start is that of π_ref."""
    told: list[float] = []
    asked: list[np.ndarray[Any, Any]] = []
    at = ShapedTable.at

    def noting(self: ShapedTable, *where: Any) -> Any:
        found = at(self, *where)
        everyone = self.mean(torch.arange(len(self.table.states)))  # type: ignore[attr-defined]
        np.testing.assert_allclose(found, everyone[where], atol=1e-4)
        asked.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShapedTable, "at", noting)
        agent = PPO(training=training, fast=fast, **options)
        agent.fit(log, backbone, rewards, after_check=lambda _, value: told.append(value))
    assert sum(map(len, asked)) == agent.record.samples == 2_048
    held_out = split_logs(log, None)[1]
    table = shaped_rewards(rewards, agent.config, backbone).on(held_out)
    expected = penalised_reward(backbone, backbone, Histories(held_out), table, 0.0)
    assert told[0] == pytest.approx(-expected, abs=1e-4)


@pytest.mark.parametrize(
    ("option", "value"), [("reward", "best"), ("uncertainty_weight", -1.0), ("bound", -0.5), ("bound", float("nan"))]
)
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    for kind in (PPO, GRPO):
        with pytest.raises(ConfigError, match=rf"Config\.{option} must be"):
            kind(**{option: value})
