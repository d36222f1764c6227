"""What the tests of the environments share: registered ids, a small data file, one of each environment."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from recsim_gr._registration import register_environments

register_environments()

SMALL = {"n_titles": 40, "history_length": 6, "pool_users": 300}
IDS = ("recsim_gr/WatchTime-v0", "recsim_gr/Replay-v0", "recsim_gr/RewardModel-v0")


@pytest.fixture(scope="session")
def ratings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 users × 30 titles of made-up ratings on a scale of 0 to 10, with durations."""
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("data") / "ratings.npz"
    ratings = np.clip(5 + 2 * rng.normal(size=(200, 1)) + 2 * rng.normal(size=(200, 30)), 0, 10)
    np.savez(path, ratings=ratings, low=0.0, high=10.0, duration_minutes=rng.uniform(2, 90, size=30))
    return path


@pytest.fixture(scope="session")
def arguments(ratings_file: Path) -> dict[str, dict[str, Any]]:
    """By id: the keywords of a small environment."""
    return {
        "recsim_gr/WatchTime-v0": SMALL,
        "recsim_gr/Replay-v0": {"data": str(ratings_file), "history_length": 6},
        "recsim_gr/RewardModel-v0": {},
    }


@pytest.fixture(scope="session")
def checksum() -> Callable[..., str]:
    """The sha256 of a world's truth and of twelve episodes.

    Integers count exactly and floats to six decimals, so that the last bits of another processor's exp do not matter,
    and any change of behaviour does.
    """

    def checksum(env: Any) -> str:
        digest = hashlib.sha256()
        for values in (*_truth(env.bandit.world), *_episodes(env)):
            array = np.asarray(values)
            if array.dtype.kind == "f":
                array = np.rint(array.astype(np.float64) * 1e6)
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    return checksum


def _truth(world: Any) -> Iterator[Any]:
    for split in ("train", "test"):
        users = world.users(split, 5)
        yield from (world.satisfaction(users), world.expected_score(users), world.utilities(users))


def _episodes(env: Any) -> Iterator[Any]:
    for episode in range(12):
        observation, info = env.reset(seed=0 if episode == 0 else None)
        seen = int(observation["titles"][3])
        _, reward, _, _, final = env.step(seen if episode == 5 else 83 * episode % env.bandit.n_titles)
        for part in (observation, {"user": info["user"], "reward": reward}, final):
            yield from (part[key] for key in sorted(part))


@pytest.fixture(params=IDS)
def env_id(request: pytest.FixtureRequest) -> str:
    """Each registered environment in turn."""
    return str(request.param)


@pytest.fixture
def make(arguments: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    """A small environment of an id, without wrappers."""

    def make(env_id: str, **further: Any) -> Any:
        return gymnasium.make(env_id, **(arguments[env_id] | further)).unwrapped

    return make


@pytest.fixture
def make_vec(arguments: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    """A small vector environment of an id."""

    def make_vec(env_id: str, num_envs: int, **further: Any) -> Any:
        return gymnasium.make_vec(env_id, num_envs=num_envs, **(arguments[env_id] | further))

    return make_vec
