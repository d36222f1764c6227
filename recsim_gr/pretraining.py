"""Pretraining: next-title imitation over every prefix of every history."""

from collections.abc import Callable
from dataclasses import replace

import torch

from recsim_gr.backbone import HSTU, HSTUConfig, TitleMetadata
from recsim_gr.log import AnyLog, title_counts
from recsim_gr.randomness import derived_seed
from recsim_gr.training import (
    Batch,
    HistorySource,
    TrainingConfig,
    TrainingRecord,
    chosen_log_probs,
    histories_of,
    prefix_logits,
    split_logs,
    train,
)

PRETRAINING = TrainingConfig(steps=640, learning_rate=1e-2, warmup_steps=50, checks=8)
"""Ten passes over 4,000 users, at a higher rate than what starts from it; suite ``convergence`` sets it beside a run
ten times as long."""


def pretrain(
    log: AnyLog,
    config: HSTUConfig | None = None,
    training: TrainingConfig = PRETRAINING,
    validation: AnyLog | None = None,
    seed: int = 0,
    after_check: Callable[[int, float], None] | None = None,
) -> HSTU:
    """Trains a backbone to imitate: −log π(next title | prefix), all prefixes of all users.

    Args:
        log: what to imitate; a log in shards is read a few parts at a time.
        config: the backbone's shape; ``max_length`` 0 takes the log's longest history.
        training: the schedule.
        validation: users to stop on; without it, the last tenth of the log's users (see `split_logs`).
        seed: of initial weights, batches and dropout.
        after_check: told (step, validation negative log-likelihood), for progress bars.

    Raises:
        ConfigError: an empty log, or logs over different catalogues.
        TrainingError: training diverged.
    """
    backbone, _ = pretrain_with_record(log, config, training, validation, seed, after_check)
    return backbone


def pretrain_with_record(
    log: AnyLog,
    config: HSTUConfig | None = None,
    training: TrainingConfig = PRETRAINING,
    validation: AnyLog | None = None,
    seed: int = 0,
    after_check: Callable[[int, float], None] | None = None,
) -> tuple[HSTU, TrainingRecord]:
    """`pretrain`, with the record of the run."""
    train_histories, held_out = (histories_of(part) for part in split_logs(log, validation))
    config = config or HSTUConfig()
    if config.max_length == 0:
        config = replace(config, max_length=train_histories.longest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "backbone"))
        backbone = HSTU(config, log.n_titles, title_metadata(log, config))

    def loss(batch: Batch) -> torch.Tensor:
        return imitation_loss(backbone, batch)

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


def title_metadata(log: AnyLog, config: HSTUConfig) -> TitleMetadata | None:
    """What represents the titles of a log beside their own embeddings, where the config wants it."""
    catalogue = log.catalogue
    if config.metadata == "never" or catalogue is None:
        return None
    if config.metadata == "when_cold" and not catalogue.has_releases:
        return None
    return TitleMetadata(catalogue, title_counts(log) > 0, config)


def imitation_loss(backbone: HSTU, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor:
    """Mean −log π(next title | prefix) of a batch, a scalar."""
    log_probs = chosen_log_probs(prefix_logits(backbone, batch, states), batch)
    return -log_probs.sum() / batch.valid.sum()


def negative_log_likelihood(backbone: HSTU, histories: HistorySource) -> float:
    """Mean −log π(next title | prefix) over all events of the histories, in nats; no gradients."""
    total, events = 0.0, 0
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        for batch in histories.chunks():
            total += -chosen_log_probs(prefix_logits(backbone, batch), batch).sum().item()
            events += int(batch.valid.sum())
    backbone.train(was_training)
    return total / events
