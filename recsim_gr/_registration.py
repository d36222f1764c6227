"""The environments' ids, told to Gymnasium; their modules are imported when one is made."""

import gymnasium

ENVIRONMENTS = {
    "recsim_gr/WatchTime-v0": ("recsim_gr.envs.watch_time", "WatchTimeEnv"),
    "recsim_gr/Replay-v0": ("recsim_gr.envs.replay", "ReplayEnv"),
    "recsim_gr/RewardModel-v0": ("recsim_gr.envs.reward_model", "RewardModelEnv"),
}
"""By id: the module and the class; the vector environment beside it is called XVectorEnv where the class is XEnv."""


def register_environments() -> None:
    """Registers every environment that is not registered yet."""
    for env_id, (module, name) in ENVIRONMENTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point=f"{module}:{name}",
                vector_entry_point=f"{module}:{name.removesuffix('Env')}VectorEnv",
            )
