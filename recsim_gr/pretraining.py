"""Pretraining: next-title imitation over every prefix of every history."""

from collections.abc import Callable
from dataclasses import replace

import torch

from recsim_gr.backbones import Backbone, BackboneConfig, HSTUConfig, TitleMetadata, new_backbone
from recsim_gr.histories import Batch, histories_of, split_logs
from recsim_gr.log import AnyLog, title_counts
from recsim_gr.prefixes import imitation_loss, negative_log_likelihood
from recsim_gr.randomness import derived_seed
from recsim_gr.sampled_softmax import Softmax, SoftmaxConfig
from recsim_gr.training import TrainingConfig, TrainingRecord, train

PRETRAINING = TrainingConfig(steps=640, learning_rate=1e-2, warmup_steps=50, checks=8)
"""Ten passes over 4,000 users, at a higher rate than what starts from it; suite ``convergence`` sets it beside a run
ten times as long."""


def pretrain(
    log: AnyLog,
    config: BackboneConfig | None = None,
    training: TrainingConfig = PRETRAINING,
    validation: AnyLog | None = None,
    seed: int = 0,
    after_check: Callable[[int, float], None] | None = None,
    softmax: SoftmaxConfig | None = None,
) -> Backbone:
    """Trains a backbone to imitate: −log π(next title | prefix), all prefixes of all users.

    Args:
        log: what to imitate; a log in shards is read a few parts at a time.
        config: which backbone, and its shape, `HSTUConfig()` by default; ``max_length`` 0 takes the longest history.
        training: the schedule.
        validation: users to stop on; without it, the last tenth of the log's users (see `split_logs`).
        seed: of initial weights, batches and dropout.
        after_check: told (step, validation negative log-likelihood), for progress bars.
        softmax: over all titles or a sample of them, by default as `SoftmaxConfig` says; validation takes all.

    Raises:
        ConfigError: an empty log, or logs over different catalogues.
        TrainingError: training diverged.
    """
    backbone, _ = pretrain_with_record(log, config, training, validation, seed, after_check, softmax)
    return backbone


def pretrain_with_record(
    log: AnyLog,
    config: BackboneConfig | None = None,
    training: TrainingConfig = PRETRAINING,
    validation: AnyLog | None = None,
    seed: int = 0,
    after_check: Callable[[int, float], None] | None = None,
    softmax: SoftmaxConfig | None = None,
) -> tuple[Backbone, TrainingRecord]:
    """`pretrain`, with the record of the run."""
    train_histories, held_out = (histories_of(part) for part in split_logs(log, validation))
    config = config or HSTUConfig()
    if config.max_length == 0:
        config = replace(config, max_length=train_histories.longest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "backbone"))
        backbone = new_backbone(config, log.n_titles, title_metadata(log, config))

    over = softmax_over(log, softmax)

    def loss(batch: Batch) -> torch.Tensor:
        return imitation_loss(backbone, batch, softmax=over)

    record = train(
        backbone,
        loss,
        lambda: negative_log_likelihood(backbone, held_out),
        train_histories,
        training,
        seed,
        "pretraining",
        after_check,
    )
    return backbone, record


def softmax_over(log: AnyLog, config: SoftmaxConfig | None = None) -> Softmax:
    """The softmax over a log's catalogue; its titles are counted where they are drawn by popularity."""
    config = config or SoftmaxConfig()
    counted = config.samples(log.n_titles) and config.proposal == "popularity"
    return Softmax(config, log.n_titles, torch.from_numpy(title_counts(log)) if counted else None)


def title_metadata(log: AnyLog, config: BackboneConfig) -> TitleMetadata | None:
    """What represents the titles of a log beside their own embeddings, where the config wants it."""
    catalogue = log.catalogue
    if config.metadata == "never" or catalogue is None:
        return None
    if config.metadata == "when_cold" and not catalogue.has_releases:
        return None
    return TitleMetadata(catalogue, title_counts(log) > 0, config.dimensions, config.id_dropout)
