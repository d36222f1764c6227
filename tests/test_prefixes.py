"""Losses over prefixes: the same numbers as by all logits, at every event, at the last one, and over samples."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.histories import Batch, Histories
from recsim_gr.prefixes import (
    chosen_log_probs,
    imitation_loss,
    last_imitation_loss,
    negative_log_likelihood,
    prefix_log_probs,
    prefix_logits,
    prefix_states,
)
from recsim_gr.pretraining import pretrain, softmax_over
from recsim_gr.sampled_softmax import Sampler, Softmax, SoftmaxConfig, inclusion_probabilities
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, int]:
    """Histories of different lengths without repeats, in a catalogue where some titles may not be out yet."""
    n_titles, b = draw(st.integers(2, 12)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    lengths = rng.integers(1, n_titles + 1, size=b)
    if draw(st.booleans()):
        lengths[:] = lengths.max()
    t = int(lengths.max())
    orders = np.stack([rng.permutation(n_titles)[:t] for _ in range(b)])
    valid = np.arange(t) < lengths[:, None]
    titles = torch.from_numpy(np.where(valid, orders, n_titles))
    scores = torch.from_numpy(np.where(valid, rng.uniform(1, 5, size=(b, t)), 0.0).astype(np.float32))
    times = torch.from_numpy(np.where(valid, rng.uniform(0, 9, size=(b, t)).cumsum(axis=1), 0.0).astype(np.float32))
    unreleased = None
    if draw(st.booleans()):  # nobody has watched what is not out
        unreleased = torch.from_numpy(rng.random((b, n_titles)) < 0.5)
        unreleased = torch.cat([unreleased, torch.zeros(b, 1, dtype=torch.bool)], dim=1)
        unreleased = unreleased.scatter(1, titles, False)[:, :n_titles]
    return Batch(torch.arange(b), titles, scores, times, torch.from_numpy(valid), unreleased), n_titles


def backbone_for(n_titles: int, **options: Any) -> HSTU:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return HSTU(HSTUConfig(dimensions=8, max_length=12, **options), n_titles).eval()


def by_all_logits(backbone: HSTU, batch: Batch) -> Tensor:
    # the softmax in float64: where a title is all but certain, float32 loses digits of 1 - p that ours keeps
    return chosen_log_probs(torch.log_softmax(prefix_logits(backbone, batch).double(), dim=-1), batch).float()


def gradient(loss: Tensor, backbone: HSTU) -> Tensor:
    found = torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])


@PROPERTY
@given(batches(), st.sampled_from(["cosine", "dot"]))
def test_the_imitation_loss_is_the_one_by_all_logits(drawn: tuple[Batch, int], similarity: str) -> None:
    batch, n_titles = drawn
    backbone = backbone_for(n_titles, similarity=similarity)
    expected = -by_all_logits(backbone, batch).sum() / batch.valid.sum()
    right = gradient(expected, backbone)
    for loss in (
        imitation_loss(backbone, batch),
        imitation_loss(backbone, batch, prefix_states(backbone, batch)),
        imitation_loss(backbone, batch, softmax=Softmax(SoftmaxConfig(chunk_rows=3), n_titles)),
        -prefix_log_probs(backbone, batch).sum() / batch.valid.sum(),
    ):
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(gradient(loss, backbone), right, atol=1e-5 * float(right.abs().max()) + 1e-6, rtol=0)


@PROPERTY
@given(batches())
def test_log_probabilities_are_those_by_all_logits(drawn: tuple[Batch, int]) -> None:
    batch, n_titles = drawn
    backbone = backbone_for(n_titles)
    found = prefix_log_probs(backbone, batch)
    torch.testing.assert_close(found, by_all_logits(backbone, batch), atol=1e-5, rtol=1e-6)
    assert not found[~batch.valid].any()
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(0))
    right = gradient((by_all_logits(backbone, batch) * weights).sum(), backbone)
    weighted = gradient((found * weights).sum(), backbone)
    torch.testing.assert_close(weighted, right, atol=1e-5 * float(right.abs().max()) + 1e-6, rtol=0)


@PROPERTY
@given(batches())
def test_the_last_loss_is_that_of_the_last_events(drawn: tuple[Batch, int]) -> None:
    batch, n_titles = drawn
    backbone = backbone_for(n_titles)
    last = (batch.valid.sum(dim=1) - 1)[:, None]
    expected = -by_all_logits(backbone, batch).gather(1, last).mean()
    loss = last_imitation_loss(backbone, batch)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    right = gradient(expected, backbone)
    torch.testing.assert_close(gradient(loss, backbone), right, atol=1e-5 * float(right.abs().max()) + 1e-6, rtol=0)


def test_the_last_loss_reads_nothing_of_the_last_event_but_its_title() -> None:
    titles = torch.tensor([[2, 0, 4, 1], [3, 1, 6, 6], [5, 6, 6, 6]])
    valid, scores = titles < 6, torch.full(titles.shape, 4.0)
    times = torch.arange(4.0).expand(3, 4)
    batch = Batch(torch.arange(3), titles, scores, times, valid)
    last = (valid.sum(dim=1) - 1)[:, None]
    other = batch._replace(scores=scores.scatter(1, last, 1.0), times=times.scatter(1, last, 99.0))
    backbone = backbone_for(6)
    assert torch.equal(last_imitation_loss(backbone, batch), last_imitation_loss(backbone, other))
    before = batch._replace(scores=torch.where(torch.arange(4) < last, 1.0, scores))
    assert not torch.equal(last_imitation_loss(backbone, batch), last_imitation_loss(backbone, before))


@PROPERTY
@given(batches())
def test_a_sample_of_all_titles_gives_the_full_loss(drawn: tuple[Batch, int]) -> None:
    batch, n_titles = drawn
    backbone, softmax = backbone_for(n_titles), Softmax(SoftmaxConfig(), n_titles)
    softmax.sampler = None
    full = imitation_loss(backbone, batch), last_imitation_loss(backbone, batch)
    softmax.sampler = Sampler(torch.ones(n_titles), n_titles)
    torch.testing.assert_close(imitation_loss(backbone, batch, softmax=softmax), full[0])
    torch.testing.assert_close(last_imitation_loss(backbone, batch, softmax), full[1])


def test_sampled_training_approaches_the_full_likelihood() -> None:
    log = World(WorldConfig(n_titles=300, history_length=8)).generate_log(512)
    histories = Histories(log)
    counts = torch.from_numpy(np.bincount(log.title, minlength=300))
    batch = next(histories.chunks(512))
    reached = {}
    with torch.random.fork_rng(devices=[]):
        for name, config in {
            "full": SoftmaxConfig(),
            "sampled": SoftmaxConfig(kind="sampled", negatives=64),
            "uniform": SoftmaxConfig(kind="sampled", negatives=64, proposal="uniform"),
        }.items():
            torch.manual_seed(1)
            backbone, softmax = backbone_for(300, dropout=0.0), Softmax(config, 300, counts)
            optimiser = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
            for _ in range(60):
                optimiser.zero_grad()
                imitation_loss(backbone, batch, softmax=softmax).backward()
                optimiser.step()
            reached[name] = negative_log_likelihood(backbone, histories)
    untrained = negative_log_likelihood(backbone_for(300), histories)
    assert reached["full"] < reached["sampled"] < reached["full"] + 0.1 * (untrained - reached["full"])
    assert reached["full"] < reached["uniform"] < reached["full"] + 0.1 * (untrained - reached["full"])


def test_the_likelihood_is_the_mean_over_events_by_all_logits() -> None:
    histories = Histories(World(WorldConfig(n_titles=30, history_median=4, history_length=9)).generate_log(300))
    backbone = backbone_for(30).train()
    found = negative_log_likelihood(backbone, histories)
    assert backbone.training
    backbone.eval()
    with torch.no_grad():
        total = sum(-by_all_logits(backbone, batch).sum().item() for batch in histories.chunks(7))
    assert found == pytest.approx(total / int(histories.valid.sum()), rel=1e-6)
    assert not histories.valid.all()


def test_pretraining_takes_a_sample_where_the_config_says_so() -> None:
    log = World(WorldConfig(n_titles=40, history_length=5)).generate_log(60)
    training = TrainingConfig(steps=5, batch_users=16, checks=1)
    shape = HSTUConfig(dimensions=8, n_layers=1)
    full = pretrain(log, shape, training)
    sampled = [pretrain(log, shape, training, softmax=SoftmaxConfig(kind="sampled", negatives=10)) for _ in range(2)]
    assert torch.equal(sampled[0].titles, sampled[1].titles)  # samples come from the run's own stream
    assert not torch.equal(sampled[0].titles, full.titles)
    assert softmax_over(log).sampler is None
    over = softmax_over(log, SoftmaxConfig(kind="sampled", negatives=10)).sampler
    counts = torch.bincount(torch.tensor(log.title), minlength=40) + 1.0
    assert over is not None
    torch.testing.assert_close(over.inclusion, inclusion_probabilities(counts, 10))
