"""Pretraining: next-title imitation over every prefix of every history."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recsim_gr import configs
from recsim_gr.backbones import Backbone, BackboneConfig, HSTUConfig, TitleMetadata, new_backbone
from recsim_gr.histories import Batch, HistorySource, histories_of, split_logs
from recsim_gr.log import AnyLog, title_counts
from recsim_gr.prefixes import imitation_loss, negative_log_likelihood
from recsim_gr.randomness import derived_seed
from recsim_gr.sampled_softmax import Softmax, SoftmaxConfig
from recsim_gr.training import TrainingConfig, TrainingObserver, TrainingRecord, train

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
    *,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    progress: TrainingObserver | None = None,
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
        device: where it is trained, and left; initial weights and batches are the same on all.
        checkpoint: a directory in which the run is kept at every check, and from which the same call goes on where it
            was cut off; where it was finished, the call returns at once. See `train`.
        progress: told every step and check: `recsim_gr.progress.TrainingProgress`, say.

    Raises:
        ConfigError: an empty log, logs over different catalogues, or a device that is not here.
        TrainingError: training diverged.
        CheckpointError: the checkpoint is damaged, or that of another run: says what differs.
    """
    options: dict[str, Any] = {"device": device, "checkpoint": checkpoint, "progress": progress}
    backbone, _ = pretrain_with_record(log, config, training, validation, seed, after_check, softmax, **options)
    return backbone


def pretrain_with_record(
    log: AnyLog,
    config: BackboneConfig | None = None,
    training: TrainingConfig = PRETRAINING,
    validation: AnyLog | None = None,
    seed: int = 0,
    after_check: Callable[[int, float], None] | None = None,
    softmax: SoftmaxConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    progress: TrainingObserver | None = None,
) -> tuple[Backbone, TrainingRecord]:
    """`pretrain`, with the record of the run."""
    train_histories, held_out = (histories_of(part) for part in split_logs(log, validation))
    config = config or HSTUConfig()
    if config.max_length == 0:
        config = replace(config, max_length=train_histories.longest)
    backbone = initial_backbone(config, log.n_titles, seed, log)
    record = imitate(
        backbone,
        train_histories,
        lambda: negative_log_likelihood(backbone, held_out),
        training,
        seed,
        softmax_over(log, softmax),
        after_check=after_check,
        device=device,
        checkpoint=checkpoint,
        identity={"validation": held_out.fingerprint} if checkpoint is not None else None,
        progress=progress,
    )
    return backbone, record


def initial_backbone(config: BackboneConfig, n_titles: int, seed: int, log: AnyLog | None = None) -> Backbone:
    """An untrained backbone with the initial weights that `pretrain` starts from, on the CPU; with the metadata of the
    log's titles, where there is a log and the config wants them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "backbone"))
        return new_backbone(config, n_titles, None if log is None else title_metadata(log, config))


def imitate(
    backbone: Backbone,
    histories: HistorySource,
    objective: Callable[[], float],
    training: TrainingConfig,
    seed: int,
    softmax: Softmax | None = None,
    *,
    after_check: Callable[[int, float], None] | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: TrainingObserver | None = None,
) -> TrainingRecord:
    """Trains a backbone to imitate histories, wherever they come from, and leaves it in its best state.

    Args:
        backbone: what is trained.
        histories: whose next titles it learns.
        objective: on held-out users, lower is better: their negative log-likelihood, or minus a ranking metric.
        training: the schedule.
        seed: of batches and dropout.
        softmax: over all titles or a sample of them; by default over all.
        after_check, device, checkpoint, progress: see `pretrain`.
        identity: what else decides the result, beside the backbone's shape and the softmax; see `train`.

    Raises:
        ConfigError, TrainingError, CheckpointError: see `pretrain`.
    """

    def loss(batch: Batch) -> torch.Tensor:
        return imitation_loss(backbone, batch, softmax=softmax)

    decided = {"backbone": backbone.shape(), "softmax": None if softmax is None else configs.to_dict(softmax.config)}
    return train(
        backbone,
        loss,
        objective,
        histories,
        training,
        seed,
        "pretraining",
        after_check,
        falls=True,
        device=device,
        checkpoint=checkpoint,
        identity=decided | (identity or {}),
        progress=progress,
    )


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
