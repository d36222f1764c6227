"""Many users at a time, without a loop over them."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from recsim_gr.envs.bandit import Bandit, Episodes, FloatArray, Observation, Played, Rows, require_count


class BanditVectorEnv(VectorEnv[Observation, NDArray[np.int64], NDArray[Any]]):
    """``num_envs`` episodes at a time; its subclasses are the registered vector environments.

    Every step ends every episode, and the next contexts come with it (``AutoresetMode.SAME_STEP``). As Gymnasium's own
    vector environments do in that mode, it returns the observations and infos of the *new* episodes, and puts what the
    actions earned into ``infos["final_info"]``; beside each key of an info, ``_key`` is an array of True. Environment
    i plays episodes i, num_envs + i, … of the seed, which are the single environment's.

    What costs time or memory is there on request only.

    Args:
        bandit: contexts and rewards.
        num_envs: n.
        action_mask: puts ``action_mask``, int8 (n, I), into the infos of reset and step.
        regret: puts ``regret`` and ``best_satisfaction``, float64 (n,), into ``final_info``, where they are known.
        final_obs: puts ``final_obs`` into the infos of a step: an object array of n dictionaries. They say what the
            call before returned, since a context does not change with the step that ends its episode.

    Raises:
        ConfigError: fewer than one environment.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (as Gymnasium declares it)
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        bandit: Bandit,
        num_envs: int,
        *,
        action_mask: bool = False,
        regret: bool = False,
        final_obs: bool = False,
    ) -> None:
        require_count("num_envs", num_envs)
        self.bandit, self.num_envs = bandit, num_envs
        self.single_observation_space, self.single_action_space = (
            bandit.observation_space,
            spaces.Discrete(bandit.n_titles),
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._with_mask, self._with_regret, self._with_final_obs = action_mask, regret, final_obs
        self._episodes: Episodes | None = None
        self._now: tuple[Rows, FloatArray] | None = None  # of the running episodes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The next n contexts; ``seed`` and ``options`` as in `BanditEnv.reset`."""
        super().reset(seed=seed)
        if seed is not None or self._episodes is None:
            seed = seed if seed is not None else int(self.np_random.integers(2**63))
            self._episodes = Episodes(self.bandit, seed)
        self._now = rows, _ = self._episodes.take(self.num_envs)
        return self.bandit.observe(rows), self._infos(rows)

    def step(self, actions: Any) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Shows every user a title and draws the next users.

        Raises:
            InvalidAction: not n integers in 0 to I − 1.
            ResetNeeded: there was no reset.
        """
        rows, u = self._current("step")
        played = self.bandit.play(rows, self._titles(actions), u, regret=self._with_regret)
        assert self._episodes is not None
        self._now = following, _ = self._episodes.take(self.num_envs)
        infos = self._infos(following) | self._final(rows, played)
        ended, truncated = np.ones(self.num_envs, dtype=bool), np.zeros(self.num_envs, dtype=bool)
        return self.bandit.observe(following), played.rewards, ended, truncated, infos

    def action_masks(self) -> NDArray[np.bool_]:
        """(n, I) bool: which titles each user has not seen.

        Raises:
            ResetNeeded: there was no reset.
        """
        rows, _ = self._current("action_masks")
        return self.bandit.action_mask(rows).astype(bool)

    def _current(self, method: str) -> tuple[Rows, FloatArray]:
        if self._now is None:
            raise ResetNeeded(f"call reset() before {method}()")
        return self._now

    def _titles(self, actions: Any) -> Rows:
        titles, last = np.asarray(actions), self.bandit.n_titles - 1
        if titles.shape != (self.num_envs,) or titles.dtype.kind not in "iu":
            raise InvalidAction(
                f"actions are {self.num_envs} integers in 0 to {last}, got {titles.dtype} of {titles.shape}"
            )
        outside = (titles < 0) | (titles > last)
        if outside.any():
            index = int(np.argmax(outside))
            raise InvalidAction(f"actions are integers in 0 to {last}, got {titles[index]} at {index}")
        return titles.astype(np.int64)

    def _infos(self, rows: Rows) -> dict[str, Any]:
        infos: dict[str, Any] = {"user": self.bandit.users(rows)}
        if self._with_mask:
            infos["action_mask"] = self.bandit.action_mask(rows)
        return self._marked(infos)

    def _final(self, rows: Rows, played: Played) -> dict[str, Any]:
        final: dict[str, Any] = {"final_info": self._marked(played.info | {"invalid": played.invalid})}
        if self._with_final_obs:
            final["final_obs"] = self._apart(self.bandit.observe(rows))
        return self._marked(final)

    def _marked(self, infos: dict[str, Any]) -> dict[str, Any]:
        everyone = np.ones(self.num_envs, dtype=bool)
        return infos | {f"_{key}": everyone for key in infos}

    def _apart(self, observations: Observation) -> NDArray[np.object_]:
        apart = np.empty(self.num_envs, dtype=object)
        for i in range(self.num_envs):  # on request only: Gymnasium wants an object a sub-environment
            apart[i] = {name: values[i] for name, values in observations.items()}
        return apart
