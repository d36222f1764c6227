"""Pretraining on real sequences: imitation of the training part, tested by leave-one-out beside two baselines.

A run directory holds ``config.json`` (what decides the result), ``training`` (the training as it stands, from which the
same call goes on), ``backbone.json`` and ``backbone.safetensors`` (see `recsim_gr.load_backbone`), ``titles.json`` (the
file's name of every title) and ``result.json`` (all figures).

Which values a backbone has by default is in `PRESETS`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recsim_gr import configs
from recsim_gr.backbones import Backbone, BackboneConfig, HSTUConfig, SASRecConfig, SetEncoderConfig, backbone_type
from recsim_gr.checkpoints import save_backbone
from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.files import read_json, write_json
from recsim_gr.histories import Histories, histories_of, split_logs
from recsim_gr.leave_one_out import (
    Figure,
    LeaveOneOut,
    Scorer,
    backbone_scorer,
    held_out_nll,
    ranking_figures,
    ranks,
)
from recsim_gr.log import AnyLog
from recsim_gr.neighbours import KNNChoice, best_item_knn, popularity
from recsim_gr.pretraining import PRETRAINING, imitate, initial_backbone, pretrain_with_record
from recsim_gr.sampled_softmax import Softmax, SoftmaxConfig
from recsim_gr.sequences import Sequences
from recsim_gr.training import TrainingConfig, TrainingObserver, TrainingRecord


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a backbone learns real sequences."""

    epochs: float = 40.0
    """Passes over the training events. Held-out NLL has its lowest point within them on MovieLens-100K."""
    steps: int = 0
    """Gradient steps; 0 goes by the epochs."""
    batch_windows: int = 64
    """Windows a batch, all their prefixes at once."""
    learning_rate: float = 3e-3
    """Peak rate of AdamW."""
    weight_decay: float = 0.01
    """AdamW's default."""
    warmup_share: float = 0.05
    """Of all steps, while the rate rises."""
    checks: int = 20
    """How often held-out NLL is measured; the state with the lowest is kept."""
    precision: str = "float32"
    """See `recsim_gr.training.TrainingConfig`."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.epochs > 0, self, "epochs", "positive")
        require(self.steps >= 0, self, "steps", "0 or more")
        require(self.batch_windows >= 1, self, "batch_windows", "at least 1")
        require(0.0 <= self.warmup_share < 1.0, self, "warmup_share", "in [0, 1)")
        self.training(1)

    def training(self, n_windows: int) -> TrainingConfig:
        """In steps, for so many windows."""
        steps = self.steps or max(1, math.ceil(self.epochs * n_windows / min(self.batch_windows, n_windows)))
        return TrainingConfig(
            steps=steps,
            batch_users=self.batch_windows,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=round(self.warmup_share * steps),
            checks=self.checks,
            precision=self.precision,
        )


class Preset(NamedTuple):
    """What a backbone is trained with where nothing else is said."""

    backbone: BackboneConfig
    schedule: Schedule


PRESETS: dict[str, Preset] = {
    "hstu": Preset(HSTUConfig(dimensions=64, max_length=50, dropout=0.5, scores=False), Schedule(learning_rate=1e-2)),
    "sasrec": Preset(
        SASRecConfig(dimensions=64, max_length=50, dropout=0.2, scores=False), Schedule(learning_rate=3e-3)
    ),
    "set": Preset(
        SetEncoderConfig(dimensions=64, max_length=50, dropout=0.2, scores=False), Schedule(learning_rate=1e-2)
    ),
}
"""By one rule, on MovieLens-100K: the highest validation NDCG@10, at a seed (1000) that is never reported, of the same
four trials for each backbone: dropout .2 and .5 by rates 3e-3 and 1e-2. All else was set beforehand: 64 wide, two
layers and windows of 50, as the public runs have it, and 40 epochs, after which held-out NLL has turned or is flat.
Tokens carry no ratings, as in the field. Test figures had no say."""


def preset(name: str) -> Preset:
    """The values for a registered backbone; its own defaults where none were chosen for it.

    Raises:
        UnknownNameError: no such backbone.
    """
    kind = backbone_type(name)
    if name in PRESETS:
        return PRESETS[name]
    return Preset(replace(kind.config_type(), max_length=50, scores=False), Schedule())


@dataclass(frozen=True)
class SequenceResult:
    """What a run found.

    Attributes:
        figures: ``figures[part][model][metric]``: part ``validation`` or ``test``; model ``popularity``, ``item-kNN``
            or the backbone's name; metric HR@10, NDCG@10, MRR.
        seen_ranked: the backbone's figures where titles of the history are ranked too, by part and metric: what some
            public runs report.
        knn: what item-kNN was chosen.
        training: the record of the training; its objective is held-out NLL in nats.
        validation_nll, test_nll: −log π of what users did next, over all titles that they had not seen.
        seconds: processor time, training apart from evaluation; none of a training that was begun by another call.
    """

    figures: dict[str, dict[str, dict[str, Figure]]]
    seen_ranked: dict[str, dict[str, Figure]]
    knn: KNNChoice
    training: TrainingRecord
    validation_nll: float
    test_nll: float
    seconds: dict[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; a figure is its mean and its standard error over users."""
        return asdict(self) | {
            "knn": self.knn._asdict(),
            "figures": {
                part: {model: _plain(found) for model, found in models.items()} for part, models in self.figures.items()
            },
            "seen_ranked": {part: _plain(found) for part, found in self.seen_ranked.items()},
        }


def _plain(found: dict[str, Figure]) -> dict[str, dict[str, float]]:
    return {metric: figure._asdict() for metric, figure in found.items()}


def pretrain_sequences(
    sequences: Sequences,
    backbone: BackboneConfig,
    schedule: Schedule,
    out: str | Path,
    seed: int = 0,
    *,
    device: str = "cpu",
    progress: Callable[[int], TrainingObserver] | None = None,
) -> SequenceResult:
    """Trains a backbone on the training part of real sequences, tests it, and writes all of it into a directory.

    Args:
        sequences: of real users.
        backbone: which backbone, and its shape; ``max_length`` 0 takes the longest training history. A training sample
            is a window of up to ``max_length`` events, see `LeaveOneOut.training_windows`.
        schedule: how long and how fast.
        out: the run directory; the same call goes on where it was cut off.
        seed: of initial weights, batches and dropout.
        device: where it is trained.
        progress: given the number of steps, what is told every step and check.

    Raises:
        ConfigError: scores are to be read and the file has none, or no such device.
        DataFileError: no user has three events.
        RunDirectoryError: the directory holds another configuration or something that is no run.
        TrainingError: training diverged.
        CheckpointError: the training that is kept there is damaged.
    """
    if backbone.scores and not sequences.has_ratings:
        raise ConfigError("these sequences have no ratings; leave scores off (--scores False), or give others")
    split = LeaveOneOut(sequences)
    if backbone.max_length == 0:
        backbone = replace(backbone, max_length=max(2, int(sequences.lengths.max())))
    histories = Histories(split.training_windows(backbone.max_length))
    training = schedule.training(len(histories))
    out = Path(out)
    reading = {"time_unit": sequences.time_unit, "repeats_left_out": sequences.left_out}
    claim_directory(out, _identity(sequences.sha256, backbone, schedule, seed) | {"reading": reading})
    model = initial_backbone(backbone, sequences.n_titles, seed)
    goes_on, began = (out / "training").exists(), time.process_time()
    record = imitate(
        model,
        histories,
        lambda: held_out_nll(model, split.validation),
        training,
        seed,
        _softmax(split),
        device=device,
        checkpoint=out / "training",
        identity={"data": sequences.sha256},
        progress=None if progress is None else progress(training.steps),
    )
    trained = time.process_time()
    result = _tested(model, split, record)
    result.seconds.update(training=None if goes_on else trained - began, evaluation=time.process_time() - trained)
    save_backbone(model, out)
    write_json(out / "titles.json", sequences.title_names.to_pylist())
    write_json(out / "result.json", _facts(sequences, split) | result.to_json())
    return result


class LogResult(NamedTuple):
    """What a run on a log found.

    Attributes:
        training: the record of the training; its objective is the NLL of held-out users, in nats an event.
        seconds: processor time; none of a training that was begun by another call.
    """

    training: TrainingRecord
    seconds: float | None


LOG_SCHEDULE = Schedule(
    steps=PRETRAINING.steps,
    batch_windows=PRETRAINING.batch_users,
    learning_rate=PRETRAINING.learning_rate,
    weight_decay=PRETRAINING.weight_decay,
    warmup_share=PRETRAINING.warmup_steps / PRETRAINING.steps,
    checks=PRETRAINING.checks,
)
"""`recsim_gr.pretraining.PRETRAINING`: what `recsim_gr.pretrain(log)` does."""


def pretrain_log(
    log: AnyLog,
    backbone: BackboneConfig,
    schedule: Schedule,
    out: str | Path,
    seed: int = 0,
    *,
    device: str = "cpu",
    progress: Callable[[int], TrainingObserver] | None = None,
) -> LogResult:
    """`recsim_gr.pretrain` on a log, into a run directory like that of `pretrain_sequences`.

    The last tenth of the users is held out (see `recsim_gr.histories.split_logs`), and the figure is their NLL.

    Raises:
        ConfigError: a log too short to be split, or no such device.
        RunDirectoryError, TrainingError, CheckpointError: see `pretrain_sequences`.
    """
    training = schedule.training(split_logs(log, None)[0].n_users)
    out = Path(out)
    data = histories_of(log).fingerprint
    claim_directory(out, _identity(data, backbone, schedule, seed))
    goes_on, began = (out / "training").exists(), time.process_time()
    model, record = pretrain_with_record(
        log,
        backbone,
        training,
        seed=seed,
        device=device,
        checkpoint=out / "training",
        progress=None if progress is None else progress(training.steps),
    )
    result = LogResult(record, None if goes_on else time.process_time() - began)
    save_backbone(model, out)
    write_json(out / "result.json", {"data": data, "training": asdict(record), "seconds": result.seconds})
    return result


def _tested(model: Backbone, split: LeaveOneOut, record: TrainingRecord) -> SequenceResult:
    knn, choice = best_item_knn(split)
    scorer = backbone_scorer(model)
    models: dict[str, Scorer] = {"popularity": popularity(split.counts()), "item-kNN": knn, model.name: scorer}
    parts = {"validation": split.validation, "test": split.test}
    return SequenceResult(
        figures={
            part: {name: ranking_figures(ranks(found, held_out)) for name, found in models.items()}
            for part, held_out in parts.items()
        },
        seen_ranked={
            part: ranking_figures(ranks(scorer, held_out, exclude_seen=False)) for part, held_out in parts.items()
        },
        knn=choice,
        training=record,
        validation_nll=held_out_nll(model, split.validation),
        test_nll=held_out_nll(model, split.test),
    )


def _softmax(split: LeaveOneOut) -> Softmax:
    return Softmax(SoftmaxConfig(), split.sequences.n_titles, torch.from_numpy(split.counts()))


def _facts(sequences: Sequences, split: LeaveOneOut) -> dict[str, Any]:
    return {
        "data": {
            "sha256": sequences.sha256,
            "users": len(sequences),
            "titles": sequences.n_titles,
            "events": sequences.n_events,
            "training_events": split.n_training_events,
            "users_tested": len(split.test),
            "users_not_tested": split.left_out,
            "repeats_left_out": sequences.left_out,
            "tied_test_events": split.tied_test_events,
        }
    }


# -- the run directory -------------------------------------------------------------------------------------------


def _identity(data: str, backbone: BackboneConfig, schedule: Schedule, seed: int) -> dict[str, Any]:
    return {
        "data": data,
        "backbone": type(backbone).__name__,
        "seed": int(seed),
        "shape": configs.to_dict(backbone),
        "schedule": configs.to_dict(schedule),
    }


def claim_directory(out: Path, identity: dict[str, Any]) -> None:
    """Makes a run directory, or finds that it holds the same run.

    Raises:
        RunDirectoryError: it holds another configuration, or something that is no run; nothing is changed then.
    """
    config = out / "config.json"
    try:
        if out.exists() and not out.is_dir():
            raise RunDirectoryError(f"{out} is a file; give --out a directory")
        if not config.exists():
            if out.exists() and any(not path.name.endswith(".part") for path in out.iterdir()):
                raise RunDirectoryError(f"{out} is not empty and holds no run; give --out a new or empty directory")
            write_json(config, identity)
            return
    except OSError as error:
        raise RunDirectoryError(f"{out} cannot be used ({error}); give --out another directory") from error
    kept = read_json(config)
    ours, theirs = _flat(identity), _flat(kept) if isinstance(kept, dict) else {}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name] != theirs[name]:
            raise RunDirectoryError(
                f"{out} holds a run with another configuration ({name}: {theirs.get(name)!r} there, "
                f"{ours.get(name)!r} here); give --out another directory, or remove this one"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
