"""PPO (arXiv:1707.06347, eq. 7) of one-step episodes as one tensor program: stable-baselines3's objective, without its
loops.

A rollout is drawn at once, titles by inverse CDF from the policy's own weights; they are paid
r̂(x,a) − λ·log(π(a|x)/π_ref(a|x)), r̂ straight from its table. With one step an episode the advantage is r − V(x),
and the return is r. Per minibatch::

    mean −min(ρ·Â, clip(ρ, 1 − ε, 1 + ε)·Â) + ½·mean (V(x) − r)²        ρ = π(a|x)/π_old(a|x), Â normalised

Log-probabilities are cross-entropies of the drawn titles: no distribution over titles is built, and no entropy, whose
coefficient is 0 in stable-baselines3's default.

Where it departs: several contexts of a rollout are prefixes of one history, so that a pass of the backbone over it
gives the states of all. Each context is still as likely as every other event of the log, so the expected gradient is
the same; contexts of one history resemble each other, so it is noisier, a little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr.agents.distributions import drawn_titles
from recsim_gr.backbones import Backbone
from recsim_gr.errors import ConfigError, TrainingError
from recsim_gr.histories import Histories
from recsim_gr.log import AnyLog, ShardedLog
from recsim_gr.prefixes import MASKED

if TYPE_CHECKING:
    from recsim_gr.agents.ppo import PPOConfig
    from recsim_gr.agents.reward_shaping import AnyTable

VALUE_WEIGHT = 0.5
"""Of the critic's loss: stable-baselines3's default, as the next two."""

LONGEST_GRADIENT = 0.5
"""What the gradient's norm is clipped to."""

ADAM_EPSILON = 1e-5
"""Of the optimiser."""

PREFIXES_PER_HISTORY = 8
"""Contexts that share a history. The noise of a gradient is that of the drawn titles: in a minibatch of 256 at a
pretrained policy (200 titles, 1,000 users) its variance is 1.04 times that of 256 histories, with 4 as with 8."""


def clipped_surrogate_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """−min(ρ·Â, clip(ρ, 1 − ε, 1 + ε)·Â) with ρ = exp(log π − log π_old), per example: PPO's eq. 7, negated.

    Args:
        log_probs: (n,) of the drawn titles, under the policy in training.
        old_log_probs: (n,) under the one that drew them.
        advantages: (n,).
        clip_range: ε.
    """
    if log_probs.ndim != 1 or not log_probs.shape == old_log_probs.shape == advantages.shape:
        shapes = f"{tuple(log_probs.shape)}, {tuple(old_log_probs.shape)}, {tuple(advantages.shape)}"
        raise ValueError(f"clipped_surrogate_loss takes (n,), (n,), (n,), got {shapes}")
    ratio = torch.exp(log_probs - old_log_probs)
    return -torch.min(ratio * advantages, ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages)


def normalised_advantages(rewards: Tensor, values: Tensor) -> Tensor:
    """(n,): r − V(x), less its mean, over its deviation (n − 1 degrees of freedom) + 1e-8; as it is where n is 1."""
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(f"normalised_advantages takes (n,), (n,), got {tuple(rewards.shape)}, {tuple(values.shape)}")
    advantages = rewards - values
    return advantages if len(advantages) == 1 else (advantages - advantages.mean()) / (advantages.std() + 1e-8)


class Prefixes(NamedTuple):
    """h·S contexts: S prefixes of each of h histories.

    Attributes:
        titles: (h, L) int64, padding n_titles, behind the real ones.
        scores, times: (h, L) float32.
        steps: (h, S) int64, how many events each context has seen.
        unreleased: (h, I) bool, titles that are not out yet; None where all are.
    """

    titles: Tensor
    scores: Tensor
    times: Tensor
    steps: Tensor
    unreleased: Tensor | None = None

    def at(self, rows: Tensor) -> Prefixes:
        """Those of some histories."""
        return Prefixes(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def states(self, backbone: Backbone) -> Tensor:
        """(h·S, d)."""
        states = backbone.encode(self.titles, self.scores, self.times)
        where = self.steps.unsqueeze(-1).expand(-1, -1, states.shape[-1])
        return states.gather(1, where).flatten(0, 1)

    def mask(self, n_titles: int) -> Tensor:
        """(h·S, I) float32: `MASKED` for titles that are seen or not out yet, 0 for others."""
        ahead = torch.arange(self.titles.shape[1], device=self.titles.device) >= self.steps.unsqueeze(-1)
        seen = self.titles.unsqueeze(1).masked_fill(ahead, n_titles).flatten(0, 1)
        mask = torch.zeros(len(seen), n_titles + 1, device=seen.device).scatter_(1, seen, MASKED)[:, :n_titles]
        if self.unreleased is None:
            return mask
        return mask.masked_fill(self.unreleased.repeat_interleave(self.steps.shape[1], dim=0), MASKED)


class Rollout(NamedTuple):
    """A title drawn for each of h·S contexts, and what it earned.

    Attributes:
        prefixes: the contexts.
        titles: (h, S) int64, drawn.
        log_probs: (h, S) under the policy that drew them.
        values: (h, S) V(x) at that time.
        rewards: (h, S) with the KL term.
    """

    prefixes: Prefixes
    titles: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor

    def at(self, rows: Tensor) -> Rollout:
        """Those of some histories."""
        return Rollout(self.prefixes.at(rows), *(part[rows] for part in self[1:]))


class LoggedContexts:
    """The events of a log, each standing for the history before it: what the table of r̂ is over.

    Args:
        log: in memory.

    Raises:
        ConfigError: a log in shards.
    """

    def __init__(self, log: AnyLog) -> None:
        if isinstance(log, ShardedLog):
            raise ConfigError("PPO draws single events, which takes a log in memory: read() it first")
        self.histories = Histories(log)
        self.rows = torch.from_numpy(np.cumsum(log.step == 0) - 1)  # of each event, the row of its user
        self.length = self.histories.valid.sum(dim=1)

    def draw(self, n: int, each: int, rng: torch.Generator) -> tuple[Prefixes, Tensor]:
        """n histories and ``each`` of their prefixes; and (n,) the users' rows, for the table.

        A history comes as often as it has events, and its prefixes are one of each ``each``-th part of it: every event
        is as likely as every other.
        """
        rows = self.rows[torch.randint(len(self.rows), (n,), generator=rng)]
        shares = (torch.arange(each) + torch.rand(n, each, generator=rng, dtype=torch.float64)) / each
        steps = (shares * self.length[rows, None]).long()
        batch = self.histories.batch(rows)
        titles, scores, times = (part[:, :-1] for part in (batch.titles, batch.scores, batch.times))
        return Prefixes(titles, scores, times, steps, batch.unreleased), rows


class ActorCritic(nn.Module):
    """The policy with a linear critic on its state, as `BackbonePolicy` is, but for that critic's random bias.

    Args:
        backbone: trained in place.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.value = nn.utils.skip_init(nn.Linear, backbone.config.dimensions, 1)  # draws no random numbers
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def loss(self, minibatch: Rollout, clip_range: float) -> Tensor:
        """The module docstring's, a scalar."""
        states = minibatch.prefixes.states(self.backbone)
        logits = masked_logits(self.backbone, states, minibatch.prefixes)
        log_probs = -F.cross_entropy(logits, minibatch.titles.flatten(), reduction="none")
        old, values, rewards = (x.flatten() for x in (minibatch.log_probs, minibatch.values, minibatch.rewards))
        surrogate = clipped_surrogate_loss(log_probs, old, normalised_advantages(rewards, values), clip_range)
        return surrogate.mean() + VALUE_WEIGHT * F.mse_loss(self.value(states)[:, 0], rewards)


def masked_logits(backbone: Backbone, states: Tensor, prefixes: Prefixes) -> Tensor:
    """(h·S, I)."""
    return torch.addmm(prefixes.mask(backbone.n_titles), states, backbone.title_directions().T)


class FastPPO:
    """A run: `rollout` and `learn` take turns.

    Args:
        policy: trained in place.
        reference: π_ref.
        log: whose contexts come.
        table: r̂ on it.
        config: of `PPO`.
        seed: of contexts, draws and minibatches.

    Attributes:
        rollout_seconds: processor time that drawing took.
    """

    def __init__(
        self,
        policy: Backbone,
        reference: Backbone,
        log: AnyLog,
        table: AnyTable,
        config: PPOConfig,
        seed: int,
    ) -> None:
        self.actor, self.reference = ActorCritic(policy.eval()), reference  # dropout would move the ratio
        self.contexts, self.table, self.config = LoggedContexts(log), table, config
        self.each = math.gcd(PREFIXES_PER_HISTORY, config.minibatch)
        self.rng, self.rollout_seconds = torch.Generator().manual_seed(seed), 0.0
        self.optimiser = torch.optim.Adam(self.actor.parameters(), config.learning_rate, eps=ADAM_EPSILON, fused=True)

    def run(self, after_rollout: Callable[[int], None]) -> None:
        """All rollouts of the config; ``after_rollout`` is told how many have been learned from, 0 first.

        Raises:
            TrainingError: a gradient that is not finite.
        """
        after_rollout(0)
        for done in range(1, self.config.rollouts + 1):
            began = time.process_time()
            rollout = self.rollout()
            self.rollout_seconds += time.process_time() - began
            self.learn(rollout, self.config.rate(1.0 - done / self.config.rollouts))
            after_rollout(done)

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """One, drawn by the policy as it stands."""
        prefixes, users = self.contexts.draw(self.config.rollout // self.each, self.each, self.rng)
        u = torch.rand(self.config.rollout, 1, generator=self.rng)
        parts = [
            self._played(prefixes.at(rows), users[rows], u[places])
            for rows, places in zip(
                torch.arange(len(users)).split(self.config.minibatch // self.each),
                torch.arange(len(u)).split(self.config.minibatch),
                strict=True,
            )
        ]
        return Rollout(prefixes, *(torch.cat(column).view(-1, self.each) for column in zip(*parts, strict=True)))

    def _played(self, prefixes: Prefixes, users: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """Titles, their log-probabilities, values and rewards, (n,) each, of some contexts."""
        states = prefixes.states(self.actor.backbone)
        logits = masked_logits(self.actor.backbone, states, prefixes)
        titles = drawn_titles((logits - logits.amax(dim=1, keepdim=True)).exp_(), u)[:, 0]
        log_probs = -F.cross_entropy(logits, titles, reduction="none")
        others = masked_logits(self.reference, prefixes.states(self.reference), prefixes)
        log_ratios = log_probs + F.cross_entropy(others, titles, reduction="none")
        rows, steps = users.repeat_interleave(self.each), prefixes.steps.flatten()
        predicted = torch.from_numpy(self.table.at(rows.numpy(), steps.numpy(), titles.numpy()))
        return titles, log_probs, self.actor.value(states)[:, 0], predicted - self.config.kl_weight * log_ratios

    def learn(self, rollout: Rollout, rate: float) -> None:
        """Some passes over a rollout, in new minibatches each time."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for _ in range(self.config.epochs):
            order = torch.randperm(len(rollout.titles), generator=self.rng)
            for rows in order.split(self.config.minibatch // self.each):
                self.optimiser.zero_grad(set_to_none=True)
                self.actor.loss(rollout.at(rows), self.config.clip_range).backward()
                norm = nn.utils.clip_grad_norm_(self.actor.parameters(), LONGEST_GRADIENT)
                if not torch.isfinite(norm):
                    raise TrainingError("PPO diverged: a gradient is not finite; lower learning_rate")
                self.optimiser.step()
