"""Exp-RSFT: its weights four ways, the policy it finds where scores are noisy, and the agent."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from recsim_gr.agents import BC, ExpRSFT
from recsim_gr.agents.asft import advantage_weights
from recsim_gr.agents.base import Parts
from recsim_gr.agents.exp_rsft import exp_reward_weights
from recsim_gr.agents.reward_weighted_bc import weighted_bc_loss
from recsim_gr.backbones import HSTU
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Histories
from recsim_gr.log import InteractionLog
from recsim_gr.prefixes import prefix_log_probs

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
MU = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_valid(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape, dtype=torch.bool)


# -- four ways ----------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    """λ = ½, scores 2, 3, 3.5: e^4, e^6, e^7 are as 1 : e² : e³, their sum 1 + 7.38906 + 20.08554 = 28.47460; three
    times their shares are .10536, .77849, 2.11615. The padding, however high it scores, weighs nothing."""
    scores, valid = rows([2.0, 3.0, 3.5, 99.0]), torch.tensor([[True, True, True, False]])
    got = exp_reward_weights(scores, valid, 0.5)
    np.testing.assert_allclose(got, [[0.10536, 0.77849, 2.11615, 0.0]], atol=1e-5)
    # at most 2 mean weights
    np.testing.assert_allclose(exp_reward_weights(scores, valid, 0.5, 2.0), [[0.10536, 0.77849, 2.0, 0.0]], atol=1e-5)
    # and the loss: −.10536·ln ½ − .77849·ln ¼ − 2.11615·(−1)
    log_probs = rows([math.log(0.5), math.log(0.25), -1.0, 0.0])
    loss = weighted_bc_loss(log_probs, got).sum().item()
    assert loss == pytest.approx(0.10536 * 0.693147 + 0.77849 * 1.386294 + 2.11615, abs=1e-4)


def test_hot_it_is_imitation_and_cold_the_best_event_alone() -> None:
    scores = 1.0 + 4.0 * random_rows(0, 3, 4).sigmoid()
    torch.testing.assert_close(
        exp_reward_weights(scores, all_valid(scores), 1e9), torch.ones(3, 4, dtype=torch.float64)
    )
    cold = exp_reward_weights(scores, all_valid(scores), 1e-4)
    assert cold.flatten().argmax() == scores.flatten().argmax()
    assert cold.max().item() == pytest.approx(12.0)
    assert (cold > 1e-6).sum() == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_they_are_asfts_weights_of_the_observed_score(temperature: float) -> None:
    """With Â = r − c, whatever c, and no clip."""
    scores = random_rows(1, 3, 4)
    weights = advantage_weights(scores - 0.7, temperature, clip=1e12)
    torch.testing.assert_close(exp_reward_weights(scores, all_valid(scores), temperature), weights / weights.mean())


def test_gradient() -> None:
    """−w at every log-probability, and none through the scores."""
    log_probs, scores = random_rows(0, 2, 3).requires_grad_(), random_rows(1, 2, 3).requires_grad_()

    def loss(log_probs: Tensor) -> Tensor:
        return weighted_bc_loss(log_probs, exp_reward_weights(scores, all_valid(scores), 0.7))

    assert gradcheck(loss, (log_probs,))
    loss(log_probs).sum().backward()
    assert scores.grad is None
    expected = torch.exp(scores.detach() / 0.7)
    torch.testing.assert_close(log_probs.grad, -expected / expected.mean())


@PROPERTY
@given(st.floats(-1e4, 1e4), st.floats(0.1, 10), st.floats(0.1, 5), st.integers(0, 99))
def test_only_differences_over_the_temperature_count(shift: float, unit: float, temperature: float, seed: int) -> None:
    """exp((u·r + c)/(u·λ)) is exp(r/λ) but for a factor that the mean takes out, also where exp overflows."""
    scores = random_rows(seed, 2, 4)
    valid = random_rows(seed + 1, 2, 4) > -0.5
    valid[0, 0] = True
    got = exp_reward_weights(scores, valid, temperature)
    moved = exp_reward_weights(unit * scores + shift, valid, unit * temperature)
    torch.testing.assert_close(moved, got, rtol=1e-6, atol=1e-6)
    assert got[valid].mean().item() == pytest.approx(1.0)
    assert not got[~valid].any()


@pytest.mark.parametrize(
    "call",
    [
        lambda: exp_reward_weights(torch.zeros(3), torch.ones(3, dtype=torch.bool), 1.0),
        lambda: exp_reward_weights(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool), 1.0),
        lambda: exp_reward_weights(torch.zeros(2, 3), torch.ones(2, 3), 1.0),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"exp_reward_weights takes .*got"):
        call()


@pytest.mark.parametrize(("option", "value"), [("temperature", 0.0), ("temperature", -1.0), ("clip", 0.5)])
def test_values_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"ExpRSFTConfig\.{option} must be"):
        ExpRSFT(**{option: value})


# -- noisy scores of five titles ----------------------------------------------------------------------------------


def found(titles: Tensor, chances: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """The policy over five titles at the lowest loss, where (title, score) comes up with the given chance.

    Scores are weighed as one batch of all outcomes, each as often as its chance in multiples of 1/8,000.
    """
    counts = (chances * 8_000).round()
    torch.testing.assert_close(counts, chances * 8_000)
    outcome = torch.arange(len(titles)).repeat_interleave(counts.long())
    weights = exp_reward_weights(scores[outcome][None], torch.ones(1, len(outcome), dtype=torch.bool), temperature)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=2_000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimiser.zero_grad()
        log_probs = torch.log_softmax(logits, dim=0)[titles[outcome]][None]
        loss = weighted_bc_loss(log_probs, weights).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.softmax(logits.detach(), dim=0)


TITLES = torch.arange(5).repeat_interleave(3)
SCORES = rows([2.9, 3.0, 3.1], [1.0, 1.5, 5.0], [4.0, 4.0, 4.0], [1.0, 3.0, 5.0], [2.0, 3.5, 4.5]).flatten()
CHANCES = rows([0.3, 0.4, 0.3], [0.4, 0.35, 0.25], [0.2, 0.3, 0.5], [0.3, 0.4, 0.3], [0.5, 0.3, 0.2]).flatten()


def expected_by_title(values: Tensor) -> Tensor:
    """(5,) E[values | title]."""
    return (CHANCES * values).view(5, 3).sum(dim=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_on_noisy_scores_it_finds_mu_times_the_mean_of_exp(temperature: float) -> None:
    """π = μ·E[exp(r/λ)|x,a]/Z, and not μ·exp(E[r|x,a]/λ)/Z."""
    policy = found(TITLES, MU[TITLES] * CHANCES, SCORES, temperature)
    tilted = MU * expected_by_title(torch.exp(SCORES / temperature))
    torch.testing.assert_close(policy, tilted / tilted.sum(), atol=1e-6, rtol=0)
    by_mean = MU * torch.exp(expected_by_title(SCORES) / temperature)
    gap = (policy - by_mean / by_mean.sum()).abs().max()
    assert gap > (0.3 if temperature == 0.5 else 0.01)


def test_it_seeks_risk() -> None:
    """A title that always scores 4 against one that scores 1, 3 or 5 (mean 3): at λ = ½ the second has a higher
    E[exp(r/λ)], .3·(e² + e^10) + .4·e^6 = 6771.5 against e^8 = 2981.0, though its mean is a point lower."""
    value = expected_by_title(torch.exp(SCORES / 0.5))
    assert value[3].item() == pytest.approx(0.3 * (math.exp(2) + math.exp(10)) + 0.4 * math.exp(6))
    assert value[2].item() == pytest.approx(math.exp(8))
    policy = found(TITLES, MU[TITLES] * CHANCES, SCORES, 0.5)
    assert (policy / MU)[3] > 2 * (policy / MU)[2]
    mean = expected_by_title(SCORES)
    assert mean[3] == pytest.approx(3.0)
    assert mean[2] == pytest.approx(4.0)


def test_without_noise_it_finds_mu_times_exp_r() -> None:
    scores = torch.tensor([1.5, 4.0, 2.0, 5.0, 3.0], dtype=torch.float64)
    tilted = MU * torch.exp(scores / 0.8)
    torch.testing.assert_close(found(torch.arange(5), MU, scores, 0.8), tilted / tilted.sum(), atol=1e-6, rtol=0)


# -- the agent ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(log: InteractionLog) -> InteractionLog:
    """Histories of one to six events."""
    keep = np.concatenate([np.arange(6 * user, 6 * user + 1 + user % 6) for user in range(30)])
    columns = ("user", "epoch", "step", "hours", "title", "duration_minutes", "watch_minutes", "score")
    return InteractionLog(**{name: getattr(log, name)[keep] for name in columns}, n_titles=log.n_titles)


def loss_of(agent: Any, backbone: HSTU, log: InteractionLog) -> float:
    histories = Histories(log)
    with torch.no_grad():
        problem = agent.problem(histories, log, Parts(backbone, None))
        return float(agent.batch_loss(backbone, next(histories.chunks()), problem))


@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_the_loss_in_the_agent(clip: float, ragged: InteractionLog, backbone: HSTU) -> None:
    """Against NumPy; what is cut has mean 1 again."""
    batch = next(Histories(ragged).chunks())
    with torch.no_grad():
        log_probs = prefix_log_probs(backbone, batch)[batch.valid].double().numpy()
    weights = np.exp(ragged.score.astype(np.float64) / 0.5)
    weights /= weights.mean()
    if clip:
        assert weights.max() > clip
        weights = np.minimum(weights, clip)
        weights /= weights.mean()
    got = loss_of(ExpRSFT(clip=clip), backbone, ragged)
    assert got == pytest.approx(-(weights * log_probs).mean(), rel=1e-4)
    assert abs(got + log_probs.mean()) > 0.01


def test_hot_the_agent_is_bc(ragged: InteractionLog, backbone: HSTU) -> None:
    bc, hot, cold = (loss_of(agent, backbone, ragged) for agent in (BC(), ExpRSFT(temperature=1e6), ExpRSFT()))
    assert hot == pytest.approx(bc, abs=1e-4)
    assert abs(cold - bc) > 0.01
