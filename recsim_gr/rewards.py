"""The reward model: an ensemble of backbones with a shallow head each, co-trained with imitation.

The forms that a member can have are in `recsim_gr.reward_heads`. Its loss is the squared error of the logged scores
plus ``imitation_weight`` times the imitation loss (the study's co-training).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from recsim_gr.backbones import Backbone, build_backbone
from recsim_gr.checkpoints import BROKEN, save_tensors, tensors_under
from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import CheckpointError, ConfigError
from recsim_gr.files import read_json, without_nan, write_json
from recsim_gr.histories import Batch, Histories, HistorySource, histories_of, split_logs, tensors
from recsim_gr.log import AnyLog, InteractionLog
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE, Observations
from recsim_gr.prefixes import imitation_loss, prefix_states
from recsim_gr.randomness import derived_seed
from recsim_gr.reward_baselines import as_histories, asked
from recsim_gr.reward_heads import FORMS, RewardMember
from recsim_gr.reward_intervals import INTERVALS, Calibration, Interval, Prediction, mean_interval
from recsim_gr.reward_tables import RewardTable, table_in_memory, table_on_disk
from recsim_gr.training import TrainingConfig, TrainingRecord, train

NOISE_USERS = 128
"""Training users whose residuals give the scale of the noise: some 2,500 events tell it to three percent, and a scale
need be no better."""


@dataclass(frozen=True)
class RewardEnsembleConfig:
    """How many members, what they are, and how they are trained."""

    members: int = 3
    """M: the fewest that give a deviation with more than one degree of freedom."""
    form: str = "shallow"
    """One of `reward_heads.FORMS`: ``shallow`` scores the whole catalogue by one product, ``appended`` is the study's
    literal form and scores a title by a token of its own."""
    imitation_weight: float = 0.2
    """Of the imitation loss beside the squared error: the study co-trains the two, and at a fifth (a few nats against
    about a squared point) neither gradient drowns the other."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=320))
    """Five passes over 4,000 users, a quarter more than the agents: a head starts from nothing."""
    head_rate: float = 3.0
    """The head's learning rate over the backbone's: it starts from nothing."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.members >= 2, self, "members", "at least 2, since the spread is half of the answer")
        require(self.form in FORMS, self, "form", f"one of {', '.join(FORMS)}")
        require(self.imitation_weight >= 0, self, "imitation_weight", "0 or more")
        require(self.head_rate > 0, self, "head_rate", "positive")


class RewardEnsemble:
    """M fitted members.

    Args:
        members: at least two, of one form and over one catalogue.
        records: how each was trained.
        calibration: what intervals of a score go by, see `calibrate`.

    Attributes:
        tables_in: where `on` keeps tables; None keeps them in memory. Where agents are given a log in shards, set it.
    """

    def __init__(
        self,
        members: Sequence[RewardMember],
        records: Sequence[TrainingRecord],
        calibration: Calibration | None = None,
    ) -> None:
        self.members, self.records, self.calibration = list(members), list(records), calibration
        self.tables_in: str | Path | None = None
        self._tables: WeakKeyDictionary[Any, dict[Path | None, RewardTable]] = WeakKeyDictionary()
        for member in members:
            member.eval().requires_grad_(False)

    @property
    def n_titles(self) -> int:
        """I."""
        return self.members[0].backbone.n_titles

    @property
    def form(self) -> str:
        """Of the members."""
        return self.members[0].form

    @torch.no_grad()
    def predict(self, observations: Observations, chunk: int = 512) -> Prediction:
        """Mean and deviation over the members, (n, I) each: for every title, seen ones included.

        Raises:
            ConfigError: contexts over another catalogue.
        """
        self._require_catalogue(observations.n_titles)
        device, parts = self.members[0].device, []
        if len(observations) == 0:
            return Prediction(*(np.zeros((0, self.n_titles), dtype=np.float32) for _ in range(2)))
        for start in range(0, len(observations), chunk):
            batch = [x.to(device) for x in tensors(observations[slice(start, start + chunk)])]
            parts.append(_spread(torch.stack([member(*batch) for member in self.members])))
        return _joined(parts)

    def mean(self, observations: Observations) -> NDArray[np.float32]:
        """(n, I): the ensemble's mean."""
        return self.predict(observations).mean

    @torch.no_grad()
    def at(self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None) -> Prediction:
        """Mean and deviation, (U, L) each, of one title after each prefix: far cheaper than all titles.

        Args:
            histories: U users of up to L events.
            titles: (U, L) titles; by default those that were logged. What is said where a history has ended, or of
                padding, means nothing.

        Raises:
            ConfigError: histories over another catalogue.
            ValueError: titles of another shape, or that are none.
        """
        known = as_histories(histories)
        self._require_catalogue(known.n_titles)
        which, parts = torch.from_numpy(asked(known, titles)), []
        for batch in self.members[0].batches(known):
            chosen = which[batch.rows.cpu()].to(batch.titles.device)
            parts.append(_spread(torch.stack([member.at(batch, chosen) for member in self.members])))
        return _joined(parts)

    def mean_at(
        self, histories: InteractionLog | Histories, titles: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """(U, L): the mean of `at`."""
        return self.at(histories, titles).mean

    # -- intervals ------------------------------------------------------------------------------------------------

    def interval(self, observations: Observations, level: float = 0.9, of: str = "score") -> Interval:
        """Ends of an interval a title, (n, I) each; `recsim_gr.reward_intervals` says what it promises.

        Args:
            observations: the contexts.
            level: in (0, 1).
            of: one observed ``score``, or the ``mean`` reward.

        Raises:
            ConfigError: another level or kind, or an ensemble that was never calibrated.
        """
        return self.around(self.predict(observations), level, of)

    def around(self, prediction: Prediction, level: float = 0.9, of: str = "score") -> Interval:
        """The interval about a prediction of this ensemble, of the prediction's shape; arguments as `interval`."""
        if of not in INTERVALS:
            raise ConfigError(f"no interval of {of!r}; there are {', '.join(INTERVALS)}")
        if of == "mean":
            return mean_interval(prediction, len(self.members), level)
        if self.calibration is None:
            raise ConfigError("the ensemble is not calibrated; call calibrate(log) with users it was not fitted to")
        return self.calibration.interval(prediction, level)

    def calibrate(self, log: AnyLog, noise: float | None = None) -> Self:
        """Takes the residuals on these users for the intervals of a score.

        Args:
            log: users like those to come, who had no part in the fit.
            noise: RMS of the residuals on training users; that of the last calibration, where there was one.

        Raises:
            ConfigError: an ensemble that was never calibrated, without ``noise``; noise that is none; users of another
                catalogue.
        """
        self._require_catalogue(log.n_titles)
        if noise is None:
            if self.calibration is None:
                raise ConfigError("calibrate(log, noise) needs the noise: the RMS of the residuals on training users")
            noise = self.calibration.noise
        bounds = (LOWEST_SCORE, HIGHEST_SCORE) if log.bounded_scores else None
        user, residual, deviation = _residuals(self.members, self.members[0].batches(histories_of(log)))
        self.calibration = Calibration(user, residual, deviation, noise, bounds)
        return self

    # -- tables ---------------------------------------------------------------------------------------------------

    def on(self, log: AnyLog, directory: str | Path | None = None, verify: bool = True) -> RewardTable:
        """r̂ on every prefix of a log: computed once, shared by all agents.

        Args:
            log: in memory; or in shards, where there is a directory.
            directory: where the table is kept, or found if it was made before, by this process or another; then it is
                opened by memory map. `tables_in` by default; without either it is kept in memory, as long as the log.
            verify: whether the sha256 of the files is checked.

        Raises:
            ConfigError: a log in shards, or one too large for memory, without a directory; one of another catalogue.
            CheckpointError: a table on disk that is damaged.
            RunDirectoryError: a directory that cannot be written.
        """
        self._require_catalogue(log.n_titles)
        directory = self.tables_in if directory is None else directory
        place = None if directory is None else Path(directory)
        tables = self._tables.setdefault(log, {})
        if place not in tables:
            if place is None:
                tables[place] = table_in_memory(self.members, log)
            else:
                tables[place] = table_on_disk(self.members, log, place, verify)
        return tables[place]

    def _require_catalogue(self, n_titles: int) -> None:
        if n_titles != self.n_titles:
            raise ConfigError(
                f"the reward ensemble is over {self.n_titles} titles, and what it is asked about over {n_titles}; "
                "both must come from one catalogue"
            )

    # -- saving: JSON beside safetensors, never pickle ------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Writes ``rewards.json`` and ``rewards.safetensors`` into a directory.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        directory = Path(directory)
        state: dict[str, Tensor] = {}
        for m, member in enumerate(self.members):
            state |= {f"members.{m}.{key}": value for key, value in member.state_dict().items()}
        about: dict[str, Any] = {
            "form": self.form,
            "members": len(self.members),
            "backbone": self.members[0].backbone.shape(),
            "records": [vars(record) for record in self.records],
            "calibration": None,
        }
        if self.calibration is not None:
            about["calibration"] = {"noise": self.calibration.noise, "bounds": self.calibration.bounds}
            columns = {name: getattr(self.calibration, name) for name in ("user", "residual", "deviation")}
            state |= {f"calibration.{name}": torch.from_numpy(column) for name, column in columns.items()}
        about["sha256"] = save_tensors(directory / "rewards.safetensors", state)
        write_json(directory / "rewards.json", about | {"sha256_about": _digest(about)})


def load_reward_ensemble(directory: str | Path) -> RewardEnsemble:
    """Loads what `RewardEnsemble.save` wrote; runs no code from the files.

    Raises:
        CheckpointError: files that are missing, damaged or do not belong to each other.
    """
    directory = Path(directory)
    try:
        about = read_json(directory / "rewards.json")
        if _digest({key: value for key, value in about.items() if key != "sha256_about"}) != about["sha256_about"]:
            raise ValueError("rewards.json is not as it was written")
        content = (directory / "rewards.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise ValueError("the sha256 of rewards.safetensors is not the one that was written")
        state = load(content)
        members = []
        for m in range(int(about["members"])):
            member = FORMS[about["form"]](build_backbone(about["backbone"]), 0.0)
            member.load_state_dict(tensors_under(f"members.{m}.", state))
            members.append(member)
        records = [TrainingRecord.from_json(values) for values in about["records"]]
        return RewardEnsemble(
            members, records, _calibration(about["calibration"], tensors_under("calibration.", state))
        )
    except BROKEN as error:
        message = f"{directory} holds no reward ensemble that can be loaded ({error}); save it again"
        raise CheckpointError(message) from error


def _digest(about: dict[str, Any]) -> str:
    """The sha256 of JSON values as a file holds them, in whatever order."""
    return hashlib.sha256(json.dumps(without_nan(about), sort_keys=True).encode()).hexdigest()


def fit_reward_ensemble(
    log: AnyLog,
    backbone: Backbone,
    config: RewardEnsembleConfig | None = None,
    validation: AnyLog | None = None,
    seed: int = 0,
    after_check: Callable[[int, float], None] | None = None,
) -> RewardEnsemble:
    """Fits the ensemble; each member has its own head, its own resample of the users and its own batches.

    Members start from copies of the pretrained backbone, and part from each other by co-training. (So imitation
    need not be learned again by each.) Validation users calibrate the intervals of a score.

    Args:
        log: the scores to learn; a log in shards is read a few parts at a time, and each part is resampled by itself.
        backbone: the pretrained backbone; it is copied, not changed.
        config: members and schedule.
        validation: users to stop on, by squared error; without it, the last tenth of the log's users.
        seed: of heads, resamples, batches and dropout.
        after_check: told (step of all members' steps, validation objective), for progress bars.

    Raises:
        ConfigError: an empty log, or logs or a backbone over different catalogues.
        TrainingError: training diverged.
    """
    config = config or RewardEnsembleConfig()
    if backbone.n_titles != log.n_titles:
        kind = type(backbone).__name__
        raise ConfigError(
            f"the log has {log.n_titles} titles and the {kind} {backbone.n_titles}; pretrain it on this log"
        )
    train_log, held_out_log = split_logs(log, validation)
    histories, held_out = histories_of(train_log), histories_of(held_out_log)
    members, records = [], []
    for m in range(config.members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, f"head {m}"))
            member = FORMS[config.form](backbone, histories.mean_score)
        records.append(_fit_member(member, histories, held_out, config, seed, m, after_check))
        members.append(member)
    ensemble = RewardEnsemble(members, records)
    some = [next(members[0].batches(histories, NOISE_USERS))]
    _, residual, _ = _residuals(members, some)
    return ensemble.calibrate(held_out_log, float(np.sqrt(np.mean(residual.astype(np.float64) ** 2))))


def squared_error(predicted: Tensor, batch: Batch) -> Tensor:
    """Mean (r̂ − r)² over the events of a batch, a scalar; (B, T) predictions."""
    return (((predicted - batch.scores) ** 2) * batch.valid).sum() / batch.valid.sum()


def member_loss(member: RewardMember, batch: Batch, imitation_weight: float) -> Tensor:
    """Squared error of the logged scores plus ``imitation_weight`` times the imitation loss, a scalar."""
    states = prefix_states(member.backbone, batch) if imitation_weight > 0 else None
    error = squared_error(member.at(batch, batch.titles, states), batch)
    if states is None:
        return error
    return error + imitation_weight * imitation_loss(member.backbone, batch, states)


@torch.no_grad()
def mean_squared_error(members: Sequence[RewardMember], histories: HistorySource) -> float:
    """Mean (r̂ − r)² over all events of the histories, r̂ the mean of the members' predictions."""
    total, events = 0.0, 0
    for batch in members[0].batches(histories):
        each = torch.stack([member.at(batch, batch.titles) for member in members])
        total += (((each.mean(dim=0) - batch.scores) ** 2) * batch.valid).sum().item()
        events += int(batch.valid.sum())
    return total / events


def _fit_member(
    member: RewardMember,
    histories: HistorySource,
    held_out: HistorySource,
    config: RewardEnsembleConfig,
    seed: int,
    index: int,
    after_check: Callable[[int, float], None] | None,
) -> TrainingRecord:
    def noted(step: int, objective: float) -> None:
        if after_check is not None:
            after_check(index * config.training.steps + step, objective)

    return train(
        member,
        lambda batch: member_loss(member, batch, config.imitation_weight),
        lambda: mean_squared_error([member], held_out),
        histories.resampled(seed, f"resample {index}"),
        config.training,
        seed,
        f"reward member {index}",
        noted,
        member.groups(config.head_rate),
        falls=True,
    )


@torch.no_grad()
def _residuals(
    members: Sequence[RewardMember], batches: Iterable[Batch]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """(E,) each: the users of events, r − r̂, and the deviation over the members."""
    users, residuals, deviations = [], [], []
    for batch in batches:
        mean, deviation = _spread(torch.stack([member.at(batch, batch.titles) for member in members]))
        valid = batch.valid.cpu().numpy()
        users.append(np.repeat(batch.rows.cpu().numpy(), valid.sum(axis=1)))
        residuals.append((batch.scores.cpu().numpy() - mean)[valid])
        deviations.append(deviation[valid])
    return np.concatenate(users), np.concatenate(residuals), np.concatenate(deviations)


def _spread(scores: Tensor) -> Prediction:
    """(M, ...) to mean and deviation."""
    return Prediction(scores.mean(dim=0).cpu().numpy(), scores.std(dim=0).cpu().numpy())


def _joined(parts: Sequence[Prediction]) -> Prediction:
    return Prediction(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _calibration(about: dict[str, Any] | None, columns: dict[str, Tensor]) -> Calibration | None:
    if about is None:
        return None
    bounds = None if about["bounds"] is None else (float(about["bounds"][0]), float(about["bounds"][1]))
    user, residual, deviation = (columns[name].numpy() for name in ("user", "residual", "deviation"))
    return Calibration(user, residual, deviation, float(about["noise"]), bounds)


__all__ = [
    "RewardEnsemble",
    "RewardEnsembleConfig",
    "fit_reward_ensemble",
    "load_reward_ensemble",
    "mean_squared_error",
    "member_loss",
    "squared_error",
]
