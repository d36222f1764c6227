"""What stable-baselines3 needs to train a backbone: a vector environment, policy classes, a clean random state."""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn

from recsim_gr.agents.distributions import drawn_titles
from recsim_gr.backbones import Backbone
from recsim_gr.observations import HIGHEST_SCORE, LOWEST_SCORE
from recsim_gr.prefixes import MASKED
from recsim_gr.reward_heads import Scorer

MIDDLE_SCORE = (LOWEST_SCORE + HIGHEST_SCORE) / 2
"""What a Q function says of every title before it has learned."""


class BatchedVecEnv(VecEnv):
    """A native Gymnasium vector environment (same-step autoreset) behind stable-baselines3's interface.

    Args:
        envs: the vector environment, whose episodes end and are never truncated: of one step, or sessions.
        seed: of the first reset.
    """

    def __init__(self, envs: gym.vector.VectorEnv, seed: int) -> None:
        self.envs, self._seed = envs, seed
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self._actions = np.zeros(envs.num_envs, dtype=np.int64)

    def reset(self) -> Any:
        """Observations of all environments."""
        observations, _ = self.envs.reset(seed=self._seed)
        return dict(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Observations of the next episodes, rewards, ends and empty infos."""
        observations, rewards, terminated, truncated, _ = self.envs.step(self._actions)
        # float32 in memory of our own: PPO's callback subtracts the KL term in place
        rewards = np.array(rewards, dtype=np.float32)
        return dict(observations), rewards, terminated | truncated, [{} for _ in range(self.num_envs)]

    def close(self) -> None:
        """Closes the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the vector environment, once an index."""
        return [getattr(self.envs, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the vector environment, which all its environments share."""
        setattr(self.envs, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls a method of the vector environment, once for all."""
        return [getattr(self.envs, method_name)(*args, **kwargs)] * len(self._rows(indices))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """No environment of a native vector environment is wrapped."""
        return [False] * len(self._rows(indices))

    def _rows(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))


class _NoFeatures(BaseFeaturesExtractor):
    """The backbone reads observations itself; nothing is extracted (stable-baselines3 would one-hot ``length``)."""

    def __init__(self, observation_space: gym.spaces.Space) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observations: Any) -> Any:
        return observations


class BackbonePolicy(ActorCriticPolicy):
    """An actor that is the backbone, tied titles and seen-title mask included, and a linear critic on its state.

    Titles are drawn by inverse CDF. Dropout is off: it would move the probability ratio that PPO clips. Use it with any
    on-policy algorithm of stable-baselines3::

        PPO(BackbonePolicy, env, policy_kwargs={"backbone": backbone})

    Args:
        observation_space, action_space, lr_schedule: stable-baselines3's.
        backbone: what the actor starts from; copied.
        release: (I,) int64, the epoch that each title comes out in; None where all are out.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Space,
        action_space: gym.spaces.Space,
        lr_schedule: Schedule,
        backbone: Backbone,
        release: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["features_extractor_class"] = _NoFeatures
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        self.release = release
        self.value_net = nn.Linear(backbone.config.dimensions, 1)
        nn.init.zeros_(self.value_net.weight)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        """The base class would build perceptrons here; the constructor builds what there is to build."""

    def set_training_mode(self, mode: bool) -> None:
        """Dropout stays off."""
        super().set_training_mode(False)

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Titles (n,), values (n, 1), log-probabilities (n,)."""
        log_probs, values = self._log_probs_and_values(obs)
        if deterministic:
            titles = log_probs.argmax(dim=-1)
        else:
            titles = inverse_cdf(log_probs)
        return titles, values, log_probs.gather(1, titles[:, None])[:, 0]

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (n, 1), log-probabilities (n,) of the actions, entropies (n,)."""
        log_probs, values = self._log_probs_and_values(obs)
        own = log_probs.gather(1, actions.long().reshape(-1, 1))[:, 0]
        return values, own, -(log_probs.exp() * log_probs).sum(dim=-1)

    def get_distribution(self, obs: Any) -> Distribution:
        """The categorical distribution over titles."""
        dist = CategoricalDistribution(int(self.action_space.n))  # type: ignore[attr-defined]
        return dist.proba_distribution(action_logits=self._log_probs_and_values(obs)[0])

    def predict_values(self, obs: Any) -> Tensor:
        """(n, 1)."""
        return self._log_probs_and_values(obs)[1]

    def _log_probs_and_values(self, obs: Any) -> tuple[Tensor, Tensor]:
        titles = obs["titles"].long()
        state = self.backbone.encode_last(titles, obs["scores"], obs["times"])
        return masked_log_probs(self.backbone, state, titles, obs["epoch"], self.release), self.value_net(state)


class BackboneQNetwork(QNetwork):
    """Q of every title, from a backbone and a head like the reward model's.

    A title that is seen or not out yet is worth what the environments pay for it, the lowest score, whatever the
    backbone says: exploration may show it, which then teaches nothing; the greedy choice never is one.

    Args:
        backbone, release: as in `BackboneQPolicy`.
        **kwargs: stable-baselines3's.
    """

    def __init__(self, backbone: Backbone, release: Tensor | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.q_net = Scorer(backbone, MIDDLE_SCORE).requires_grad_(True)  # type: ignore[assignment]
        self.release = release

    def forward(self, obs: Any) -> Tensor:
        """(n, I)."""
        return self._values(obs).masked_fill(self._closed(obs), LOWEST_SCORE)

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        return self._values(observation).masked_fill(self._closed(observation), -torch.inf).argmax(dim=1)

    def _values(self, obs: Any) -> Tensor:
        values: Tensor = self.q_net(obs["titles"].long(), obs["scores"], obs["times"])
        return values

    def _closed(self, obs: Any) -> Tensor:
        """(n, I) bool."""
        n_titles = int(self.action_space.n)
        return closed_titles(obs["titles"].long(), obs["epoch"], n_titles, self.release)


class BackboneQPolicy(DQNPolicy):
    """A Q function on the backbone, for stable-baselines3's ``DQN``. Dropout is off, as in `BackbonePolicy`::

        DQN(BackboneQPolicy, env, policy_kwargs={"backbone": backbone})

    Args:
        observation_space, action_space, lr_schedule: stable-baselines3's.
        backbone: what it starts from; copied, for the target too.
        release: (I,) int64, the epoch that each title comes out in; None where all are out.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Space,
        action_space: gym.spaces.Discrete,
        lr_schedule: Schedule,
        backbone: Backbone,
        release: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs |= {"features_extractor_class": _NoFeatures, "net_arch": []}
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        self._start = (backbone, release)  # in a tuple: a module as attribute would be a part of the policy
        super()._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        """The base class would build networks before the backbone is here; the constructor calls it afterwards."""

    def make_q_net(self) -> QNetwork:
        """A network, or its target."""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return BackboneQNetwork(*self._start, **arguments).to(self.device)

    def set_training_mode(self, mode: bool) -> None:
        """Dropout stays off."""
        super().set_training_mode(False)


def closed_titles(titles: Tensor, epoch: Tensor, n_titles: int, release: Tensor | None = None) -> Tensor:
    """(n, I) bool: the titles that are seen or not out yet; arguments as in `masked_log_probs`."""
    closed = titles.new_zeros(len(titles), n_titles + 1, dtype=torch.bool).scatter_(1, titles, True)[:, :-1]
    return closed if release is None else closed | (release > epoch.reshape(-1, 1))


def masked_log_probs(
    backbone: Backbone, state: Tensor, titles: Tensor, epoch: Tensor, release: Tensor | None = None
) -> Tensor:
    """(n, I) log π over the titles that can be chosen; about `MASKED` for others, whose probability is exactly 0.

    Args:
        backbone: the policy.
        state: (n, d) after the histories.
        titles: (n, L) the histories, padding n_titles.
        epoch: (n,) or (n, 1).
        release: (I,), as in `BackbonePolicy`.
    """
    mask = state.new_zeros(len(titles), backbone.n_titles + 1).scatter_(1, titles, MASKED)[:, :-1]
    if release is not None:
        mask = mask.masked_fill(release > epoch.reshape(-1, 1), MASKED)
    return torch.log_softmax(backbone.logits(state) + mask, dim=-1)


def inverse_cdf(log_probs: Tensor) -> Tensor:
    """(n,) titles drawn from (n, I) log-probabilities, by torch's global generator, which is stable-baselines3's."""
    return drawn_titles(log_probs.exp(), torch.rand(len(log_probs), 1))[:, 0]


@contextmanager
def contained_randomness() -> Iterator[None]:
    """stable-baselines3 seeds and draws from Python's, NumPy's and torch's global generators; what they held before
    is put back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (it is what SB3 uses)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
