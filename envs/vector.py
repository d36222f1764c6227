"""Many users at a time, without a loop over them."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from recsim_gr.envs.bandit import Bandit, Episodes, FloatArray, Observation, Played, Rows, Sessions, require_count


class BanditVectorEnv(VectorEnv[Observation, NDArray[np.int64], NDArray[Any]]):
    """``num_envs`` episodes at a time; its subclasses are the registered vector environments.

    A step that ends an episode brings the next context with it (``AutoresetMode.SAME_STEP``); where the horizon is 1,
    as it is by default, that is every step of every environment. As Gymnasium's own vector environments do in that
    mode, it then returns the observations and infos of the *new* episodes, and puts what the actions earned into
    ``infos["final_info"]``; where a session goes on, that stands in ``infos`` itself. Beside each key of an info,
    ``_key`` says of which environments it is; the others' values are 0.

    The episodes of a seed are the single environment's. An environment whose episode ends takes the next one, and of
    several that end in one step the lower takes the earlier. As long as all episodes have the same length (where no
    user can abandon a session), environment i therefore plays episodes i, num_envs + i, …

    What costs time or memory is there on request only.

    Args:
        bandit: contexts and rewards.
        num_envs: n.
        action_mask: puts ``action_mask``, int8 (n, I), into the infos of reset and step; of what comes next.
        regret: puts ``regret`` and ``best_satisfaction``, float64 (n,), into ``final_info``, where they are known.
        final_obs: puts ``final_obs`` into the infos of a step: an object array of n dictionaries, None where no episode
            ended. They say what the call before returned, since a context does not change with the step that ends its
            episode.

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
        self._sessions = bandit.sessions(num_envs, regret=regret) if bandit.horizon > 1 else None
        self._episodes: Episodes | None = None
        self._now: tuple[Rows, FloatArray] | None = None  # of the running episodes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The next n contexts; ``seed`` and ``options`` as in `BanditEnv.reset`."""
        if seed is not None or self._episodes is None:
            super().reset(seed=seed)
            seed = seed if seed is not None else int(self.np_random.integers(2**63))
            self._episodes = Episodes(self.bandit, seed)
        self._now = rows, u = self._episodes.take(self.num_envs)
        if self._sessions is not None:
            self._sessions.start(np.arange(self.num_envs), rows, u)
        return self._observe(rows), self._infos(rows)

    def step(self, actions: Any) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Shows every user a title, and begins the next episode where one has ended.

        Raises:
            InvalidAction: not n integers in 0 to I − 1.
            ResetNeeded: there was no reset.
        """
        rows, u = self._current("step")
        titles = self._titles(actions)
        assert self._episodes is not None
        if self._sessions is not None:
            return self._step_sessions(self._sessions, self._episodes, titles)
        played = self.bandit.play(rows, titles, u[:, 0], regret=self._with_regret)
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
        return self._action_mask(rows).astype(bool)

    def _step_sessions(
        self, sessions: Sessions, episodes: Episodes, titles: Rows
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """A step of sessions, of which some end; the infos are those of Gymnasium's own SAME_STEP environments."""
        played = sessions.step(titles)
        over = sessions.over.copy()
        of_step = played.info | {"invalid": played.invalid}
        infos: dict[str, Any] = {}
        if not over.all():
            infos |= _where(~over, of_step)
        if over.any():
            infos |= self._end(sessions, episodes, over, of_step)
        if self._with_mask:
            infos |= self._marked({"action_mask": sessions.action_mask()})
        return sessions.observe(), played.rewards, over, np.zeros(self.num_envs, dtype=bool), infos

    def _end(
        self, sessions: Sessions, episodes: Episodes, over: NDArray[np.bool_], of_step: dict[str, Any]
    ) -> dict[str, Any]:
        """Replaces the sessions that are over by the next episodes, in the order of their environments."""
        if self._with_mask:
            of_step = of_step | {"action_mask": sessions.action_mask()}
        final: dict[str, Any] = {"final_info": _where(over, of_step)}
        if self._with_final_obs:
            final["final_obs"] = self._apart(sessions.observe())
            final["final_obs"][~over] = None
        lanes = np.flatnonzero(over)
        rows, u = episodes.take(len(lanes))
        sessions.start(lanes, rows, u)
        user = np.zeros(self.num_envs, dtype=np.int64)
        user[lanes] = self.bandit.users(rows)
        final |= {f"_{key}": over.copy() for key in final}
        return final | {"user": user, "_user": over.copy()}

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
        if titles.min() < 0 or titles.max() > last:
            index = int(np.argmax((titles < 0) | (titles > last)))
            raise InvalidAction(f"actions are integers in 0 to {last}, got {titles[index]} at {index}")
        return titles.astype(np.int64, copy=False)

    def _observe(self, rows: Rows) -> Observation:
        return self.bandit.observe(rows) if self._sessions is None else self._sessions.observe()

    def _action_mask(self, rows: Rows) -> NDArray[np.int8]:
        return self.bandit.action_mask(rows) if self._sessions is None else self._sessions.action_mask()

    def _infos(self, rows: Rows) -> dict[str, Any]:
        infos: dict[str, Any] = {"user": self.bandit.users(rows)}
        if self._with_mask:
            infos["action_mask"] = self._action_mask(rows)
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


def _where(lanes: NDArray[np.bool_], infos: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Infos of some environments only: the others' are 0 and unmarked."""
    some = {}
    for name, values in infos.items():
        some[name] = values.copy()
        some[name][~lanes] = 0
        some[f"_{name}"] = lanes.copy()
    return some
