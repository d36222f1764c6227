"""The Gymnasium environments."""

if __name__ != "recsim_gr.envs":
    raise ImportError(f"import recsim_gr.envs instead of {__name__}")

from recsim_gr.envs.bandit import Bandit, BanditEnv, UnknownArgumentError
from recsim_gr.envs.replay import ReplayEnv, ReplayVectorEnv
from recsim_gr.envs.reward_model import RewardModelEnv, RewardModelVectorEnv
from recsim_gr.envs.vector import BanditVectorEnv
from recsim_gr.envs.watch_time import WatchTimeEnv, WatchTimeVectorEnv

__all__ = [
    "Bandit",
    "BanditEnv",
    "BanditVectorEnv",
    "ReplayEnv",
    "ReplayVectorEnv",
    "RewardModelEnv",
    "RewardModelVectorEnv",
    "UnknownArgumentError",
    "WatchTimeEnv",
    "WatchTimeVectorEnv",
]
