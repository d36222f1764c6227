"""The reward model: a shallow head on the backbone, co-trained with imitation, and an ensemble of such members.

A member predicts the score of every title at once, from the state h after the history::

    r̂(x, a) = m + u·h + b_a + ⟨W h, ê_a⟩

with m the log's mean score, ê_a the backbone's own title embedding (length 1, scaled by 5 as its logits are by 20), so
that what imitation learned about titles serves the reward. Its loss is the squared error of the logged scores plus
``imitation_weight`` times the imitation loss (the study's co-training).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsim_gr.backbones import Backbone
from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Batch, Histories, HistorySource, histories_of, split_logs, tensors
from recsim_gr.log import AnyLog, InteractionLog, ShardedLog
from recsim_gr.observations import Observations
from recsim_gr.prefixes import imitation_loss, prefix_states
from recsim_gr.randomness import derived_seed
from recsim_gr.training import TrainingConfig, TrainingRecord, train

EMBEDDING_SCALE = 5.0
"""Length of the title embeddings in the head: W then starts and stays near 1 where predictions differ by a few
points of the score."""


@dataclass(frozen=True)
class RewardEnsembleConfig:
    """How many members, and how they are trained."""

    members: int = 3
    """M: the fewest that give a deviation with more than one degree of freedom."""
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
        require(self.imitation_weight >= 0, self, "imitation_weight", "0 or more")
        require(self.head_rate > 0, self, "head_rate", "positive")


class ScoreHead(nn.Module):
    """Scores of all titles from a state of the backbone: the module docstring's formula.

    Args:
        dimensions: d.
        n_titles: I.
        mean: m, what a title scores before anything is learned.
    """

    mean: Tensor

    def __init__(self, dimensions: int, n_titles: int, mean: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.user = nn.Parameter(torch.zeros(dimensions))
        self.title = nn.Parameter(torch.zeros(n_titles))
        self.mix = nn.Parameter(torch.empty(dimensions, dimensions).normal_(std=0.1 / math.sqrt(dimensions)))

    def state_side(self, states: Tensor) -> Tensor:
        """(..., d) states to (..., d + 1): what `title_side` is multiplied with."""
        return torch.cat([states @ self.mix, (self.mean + states @ self.user).unsqueeze(-1)], dim=-1)

    def title_side(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        """(I, d + 1) vectors and (I,) biases of the titles."""
        vectors = nn.functional.normalize(backbone.title_vectors(), dim=-1) * EMBEDDING_SCALE
        return torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1), self.title

    def all_titles(self, states: Tensor, backbone: Backbone) -> Tensor:
        """(..., I): the score of every title."""
        vectors, biases = self.title_side(backbone)
        return self.state_side(states) @ vectors.T + biases

    def at(self, states: Tensor, titles: Tensor, backbone: Backbone) -> Tensor:
        """(B, T): the score of one title a state; padding (index I) scores as title 0 and must be masked."""
        vectors, biases = self.title_side(backbone)
        titles = titles.clamp(max=len(biases) - 1)
        return (self.state_side(states) * vectors[titles]).sum(-1) + biases[titles]


class Scorer(nn.Module):
    """A backbone with a head: a member of the ensemble, and the Q function of `CQL`."""

    def __init__(self, backbone: Backbone, mean: float) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.head = ScoreHead(backbone.config.dimensions, backbone.n_titles, mean)

    def forward(self, titles: Tensor, scores: Tensor, times: Tensor) -> Tensor:
        """(B, I): the score of every title after the whole history."""
        state = self.backbone.encode_last(titles, scores, times)
        return self.head.all_titles(state, self.backbone)

    def groups(self, head_rate: float) -> list[dict[str, object]]:
        """Optimiser groups with the head at ``head_rate`` times the rate of the backbone."""
        return [
            {"params": list(self.backbone.parameters())},
            {"params": list(self.head.parameters()), "scale": head_rate},
        ]


class Prediction(NamedTuple):
    """What the ensemble says of every title: (n, I) float32 each."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]


class RewardEnsemble:
    """M fitted members.

    Args:
        members: at least two scorers over one catalogue.
        records: how each was trained.
    """

    def __init__(self, members: list[Scorer], records: list[TrainingRecord]) -> None:
        self.members, self.records = members, records
        self._tables: WeakKeyDictionary[InteractionLog, RewardTable] = WeakKeyDictionary()
        for member in members:
            member.eval().requires_grad_(False)

    @property
    def n_titles(self) -> int:
        """I."""
        return self.members[0].backbone.n_titles

    @torch.no_grad()
    def predict(self, observations: Observations, chunk: int = 512) -> Prediction:
        """Mean and deviation over the members (M − 1 degrees of freedom), for every title, seen ones included."""
        means, deviations = [], []
        for start in range(0, len(observations), chunk):
            batch = tensors(observations[slice(start, start + chunk)])
            scores = torch.stack([member(*batch) for member in self.members])
            means.append(scores.mean(dim=0).numpy())
            deviations.append(scores.std(dim=0).numpy())
        return Prediction(np.concatenate(means), np.concatenate(deviations))

    def mean(self, observations: Observations) -> NDArray[np.float32]:
        """(n, I): the ensemble's mean."""
        return self.predict(observations).mean

    def on(self, log: AnyLog) -> "RewardTable":
        """r̂ on every prefix of a log: computed once, shared by all agents.

        Raises:
            ConfigError: a log in shards, whose table would not fit in memory.
        """
        if isinstance(log, ShardedLog):
            raise ConfigError(
                "a table of r̂ on every prefix of a log is kept in memory: read() the log in shards first, or some of "
                "its users, as in log.users(0, 10_000).read()"
            )
        if log not in self._tables:
            self._tables[log] = RewardTable(self, Histories(log))
        return self._tables[log]


class RewardTable:
    """r̂(x, ·) for every prefix x of a log, as two factors a member: U·L·M·(d + 1) numbers, not U·L·I.

    Args:
        ensemble: the members.
        histories: the log.
    """

    @torch.no_grad()
    def __init__(self, ensemble: RewardEnsemble, histories: Histories) -> None:
        states, vectors, biases = [], [], []
        for member in ensemble.members:
            parts = [member.head.state_side(prefix_states(member.backbone, b)) for b in histories.chunks()]
            states.append(torch.cat(parts))
            vector, bias = member.head.title_side(member.backbone)
            vectors.append(vector)
            biases.append(bias)
        self.states = torch.stack(states)  # (M, U, L, d + 1)
        self.vectors = torch.stack(vectors)  # (M, I, d + 1)
        self.biases = torch.stack(biases)  # (M, I)

    def members(self, rows: Tensor) -> Tensor:
        """(M, B, L, I): every member's prediction on the prefixes of the users at ``rows``."""
        states = self.states[:, rows]  # (M, B, L, d + 1)
        flat = states.flatten(1, 2) @ self.vectors.transpose(1, 2) + self.biases[:, None]
        return flat.view(*states.shape[:3], -1)

    def mean(self, rows: Tensor) -> Tensor:
        """(B, L, I): the ensemble's mean, in one product."""
        states = self.states[:, rows].permute(1, 2, 0, 3).flatten(2)  # (B, L, M·(d + 1))
        vectors = self.vectors.permute(1, 0, 2).flatten(1)  # (I, M·(d + 1))
        return states @ (vectors.T / len(self.vectors)) + self.biases.mean(dim=0)

    def at(self, rows: NDArray[np.int64], steps: NDArray[np.int64], titles: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,): the ensemble's mean for one title a context.

        Args:
            rows: (n,) users, as rows of ``log.sequences()``.
            steps: (n,) how many events each has seen.
            titles: (n,) the titles.
        """
        which = torch.from_numpy(np.asarray(titles))
        states = self.states[:, torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(steps))]
        scores = (states * self.vectors[:, which]).sum(-1) + self.biases[:, which]
        return scores.mean(dim=0).numpy().astype(np.float32)


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
    need not be learned again by each.)

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
    histories, held_out = (histories_of(part) for part in split_logs(log, validation))
    members, records = [], []
    for m in range(config.members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, f"head {m}"))
            member = Scorer(backbone, histories.mean_score)
        records.append(_fit_member(member, histories, held_out, config, seed, m, after_check))
        members.append(member)
    return RewardEnsemble(members, records)


def squared_error(head: ScoreHead, backbone: Backbone, states: Tensor, batch: Batch) -> Tensor:
    """Mean (r̂ − r)² over the events of a batch, a scalar."""
    errors = (head.at(states, batch.titles, backbone) - batch.scores) ** 2
    return (errors * batch.valid).sum() / batch.valid.sum()


@torch.no_grad()
def mean_squared_error(members: list[Scorer], histories: HistorySource) -> float:
    """Mean (r̂ − r)² over all events of the histories, r̂ the mean of the members' predictions."""
    total, events = 0.0, 0
    for batch in histories.chunks():
        each = []
        for member in members:
            states = prefix_states(member.backbone, batch)
            each.append(member.head.at(states, batch.titles, member.backbone))
        errors = (torch.stack(each).mean(dim=0) - batch.scores) ** 2
        total += (errors * batch.valid).sum().item()
        events += int(batch.valid.sum())
    return total / events


SHRINKAGE = 5.0
"""Events' worth of the global mean in the two baselines: a user's first scores, or a rare title's, say little."""


def user_mean_baseline(histories: Histories, mean: float) -> Tensor:
    """(U, L): each user's own mean score before each event, shrunk to ``mean``; the study's first baseline."""
    scores = histories.scores * histories.valid
    before = torch.nn.functional.pad(scores.cumsum(dim=1), (1, 0))[:, :-1]
    count = torch.arange(scores.shape[1], dtype=scores.dtype)
    return (before + SHRINKAGE * mean) / (count + SHRINKAGE)


def title_mean_baseline(log: InteractionLog) -> NDArray[np.float64]:
    """(I,): each title's mean score over all users, shrunk to the global mean; the study's second baseline."""
    count = np.bincount(log.title, minlength=log.n_titles)
    total = np.bincount(log.title, weights=log.score.astype(np.float64), minlength=log.n_titles)
    return (total + SHRINKAGE * float(log.score.mean())) / (count + SHRINKAGE)


def _fit_member(
    member: Scorer,
    histories: HistorySource,
    held_out: HistorySource,
    config: RewardEnsembleConfig,
    seed: int,
    index: int,
    after_check: Callable[[int, float], None] | None,
) -> TrainingRecord:
    def loss(batch: Batch) -> Tensor:
        states = prefix_states(member.backbone, batch)
        error = squared_error(member.head, member.backbone, states, batch)
        if config.imitation_weight == 0:
            return error
        return error + config.imitation_weight * imitation_loss(member.backbone, batch, states)

    def noted(step: int, objective: float) -> None:
        if after_check is not None:
            after_check(index * config.training.steps + step, objective)

    return train(
        member,
        loss,
        lambda: mean_squared_error([member], held_out),
        histories.resampled(seed, f"resample {index}"),
        config.training,
        seed,
        f"reward member {index}",
        noted,
        member.groups(config.head_rate),
    )


__all__ = [
    "Prediction",
    "RewardEnsemble",
    "RewardEnsembleConfig",
    "RewardTable",
    "ScoreHead",
    "Scorer",
    "fit_reward_ensemble",
    "title_mean_baseline",
    "user_mean_baseline",
]
