"""Every registered agent where titles come out over time and histories vary: what is not out has no probability, and
what nobody has watched is represented by its metadata."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recsim_gr.agents import AGENTS, Agent, InformedAgent, load_agent
from recsim_gr.agents.ppo import release_of
from recsim_gr.agents.sb3 import masked_log_probs
from recsim_gr.backbones import HSTU, Backbone, HSTUConfig
from recsim_gr.histories import Histories, tensors
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts
from recsim_gr.prefixes import prefix_logits
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.scoring import COLD_METRICS
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

Make = Callable[..., Agent]

learners = pytest.mark.parametrize("name", [name for name, kind in AGENTS.items() if not kind.referee])


@pytest.fixture(scope="module")
def cold_world() -> World:
    return World(WorldConfig(n_titles=40, history_length=8, history_median=5, cold_share=0.4, n_epochs=3))


@pytest.fixture(scope="module")
def cold_log(cold_world: World) -> InteractionLog:
    return cold_world.generate_log(150, expose_propensities=True)


@pytest.fixture(scope="module")
def cold_contexts(cold_world: World) -> Contexts:
    """Of every epoch: titles that are out for some are not for others."""
    early, late = (cold_world.contexts(30, split=split) for split in ("validation", "test"))
    users = np.concatenate([early.users, late.users])
    return cold_world.contexts_of(users)


@pytest.fixture(scope="module")
def cold_backbone(cold_log: InteractionLog) -> Backbone:
    steps = TrainingConfig(steps=60, batch_users=32, learning_rate=1e-2, warmup_steps=5, checks=2)
    return pretrain(cold_log, HSTUConfig(dimensions=8, n_layers=1), steps)


@pytest.fixture(scope="module")
def cold_rewards(cold_log: InteractionLog, cold_backbone: HSTU, training: TrainingConfig) -> RewardEnsemble:
    return fit_reward_ensemble(cold_log, cold_backbone, RewardEnsembleConfig(members=2, training=training))


@learners
def test_what_is_not_out_has_no_probability(
    name: str,
    make: Make,
    cold_world: World,
    cold_log: InteractionLog,
    cold_backbone: HSTU,
    cold_rewards: RewardEnsemble,
    cold_contexts: Contexts,
    tmp_path: Path,
) -> None:
    agent = make(name)
    if isinstance(agent, InformedAgent):
        agent.meet(cold_world)
    agent.fit(cold_log, cold_backbone, cold_rewards)
    observations = cold_contexts.observations
    log_probs = agent.log_probs(observations)
    barred = observations.unavailable()
    assert (barred & ~observations.seen()).any()
    assert np.isneginf(log_probs[barred]).all()
    np.testing.assert_allclose(np.exp(log_probs.astype(np.float64)).sum(axis=1), 1.0, atol=1e-4)
    agent.save(tmp_path)
    np.testing.assert_array_equal(load_agent(tmp_path).log_probs(observations), log_probs)


def test_a_cold_title_stands_for_its_metadata_alone(cold_log: InteractionLog, cold_backbone: HSTU) -> None:
    metadata = cold_backbone.metadata
    assert metadata is not None
    seen = np.bincount(cold_log.title, minlength=40) > 0
    assert metadata.known.bool().tolist() == seen.tolist()
    before = cold_backbone.title_vectors().detach().clone()
    with torch.no_grad():
        cold_backbone.titles.add_(1.0)
        moved = (cold_backbone.title_vectors() != before).any(dim=1)
        cold_backbone.titles.sub_(1.0)
    assert moved.tolist() == seen.tolist()


def test_metadata_are_used_where_titles_come_out_unless_told_otherwise(cold_log: InteractionLog) -> None:
    short = TrainingConfig(steps=2, batch_users=32, checks=1)
    assert cold_log.catalogue is not None
    unreleased = replace(cold_log.catalogue, release=np.zeros(40, dtype=np.int64))
    for log, metadata, used in (
        (cold_log, "when_cold", True),
        (cold_log, "never", False),
        (replace(cold_log, catalogue=None), "always", False),
        (replace(cold_log, catalogue=unreleased), "when_cold", False),
        (replace(cold_log, catalogue=unreleased), "always", True),
    ):
        shape = HSTUConfig(dimensions=8, n_layers=1, metadata=metadata)
        assert (pretrain(log, shape, short).metadata is not None) == used


def test_ppo_is_masked_in_training_too_whatever_represents_titles(cold_log: InteractionLog) -> None:
    backbone = HSTU(HSTUConfig(dimensions=8, n_layers=1, max_length=8, metadata="never"), 40).eval()
    histories = cold_log.sequences()
    titles, scores, times = tensors(histories)
    state, epoch = backbone.encode_last(titles, scores, times), torch.from_numpy(histories.epoch)
    log_probs = masked_log_probs(backbone, state, titles, epoch, release_of(cold_log))
    barred = torch.from_numpy(histories.unavailable())
    assert (log_probs.exp()[barred] == 0).all()
    assert (log_probs.exp()[~barred] > 0).all()


def test_titles_that_are_not_out_are_no_negatives(cold_log: InteractionLog) -> None:
    # their logits must have no gradient from users of earlier epochs: to those they were never shown
    backbone = HSTU(HSTUConfig(dimensions=8, n_layers=1, max_length=8, metadata="never"), 40)
    batch = next(Histories(cold_log).chunks())
    logits = prefix_logits(backbone, batch)
    (gradient,) = torch.autograd.grad(torch.logsumexp(logits, dim=-1).sum(), logits)
    assert batch.unreleased is not None
    assert not gradient[batch.unreleased[:, None].expand_as(gradient)].any()


def test_metadata_make_cold_titles_worth_recommending() -> None:
    # With them the cold titles of test users are found more often than by chance; without, next to never, since an
    # embedding that was never trained says nothing.
    world = World(WorldConfig(n_titles=100, history_length=12, cold_share=0.3, n_epochs=2, genre_spread=0.2))
    log = world.generate_log(1_200)
    schedule = TrainingConfig(steps=200, learning_rate=1e-2, warmup_steps=20, checks=4)
    figures = {}
    for metadata in ("never", "when_cold"):
        backbone = pretrain(log, HSTUConfig(n_layers=1, dropout=0.1, metadata=metadata), schedule)
        figures[metadata] = world.evaluate(AGENTS["Pretrained"]().fit(log, backbone), 800).metrics
    assert set(COLD_METRICS) <= set(figures["never"])
    assert figures["when_cold"]["nll"] < figures["never"]["nll"] - 0.3
    assert figures["when_cold"]["mrr_cold"] > 1.5 * figures["never"]["mrr_cold"]
