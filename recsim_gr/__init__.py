"""recsim_gr: a gym for post-training generative recommenders, where the true satisfaction of every user is known.

Importing it registers the environments with Gymnasium and nothing else; torch is loaded when something needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recsim_gr._registration import register_environments

if TYPE_CHECKING:
    from recsim_gr import agents, benchmarks, envs
    from recsim_gr.backbones import HSTU, HSTUConfig
    from recsim_gr.bayes import BayesReference
    from recsim_gr.bayes_sampler import BayesConfig
    from recsim_gr.checkpoints import load_backbone, save_backbone
    from recsim_gr.estimators import Estimate, estimate
    from recsim_gr.log import InteractionLog, ShardedLog
    from recsim_gr.logged_truth import LogTruth, log_truth
    from recsim_gr.observations import Contexts, Observations
    from recsim_gr.pretraining import pretrain
    from recsim_gr.replay import ReplayConfig, ReplayWorld
    from recsim_gr.reward_baselines import Additive, TitleMean, UserMean
    from recsim_gr.reward_truth import reward_calibration
    from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble, load_reward_ensemble
    from recsim_gr.scoring import Evaluation, Examination, evaluate
    from recsim_gr.sequence_pretraining import pretrain_sequences
    from recsim_gr.sequences import Sequences, read_sequences
    from recsim_gr.training import TrainingConfig
    from recsim_gr.world import World, WorldConfig

__version__ = "0.1.0"

_HOME = {
    "BayesReference": "bayes",
    "BayesConfig": "bayes_sampler",
    "load_backbone": "checkpoints",
    "save_backbone": "checkpoints",
    "BackboneConfig": "backbones",
    "HSTU": "backbones",
    "HSTUConfig": "backbones",
    "SASRec": "backbones",
    "SASRecConfig": "backbones",
    "SetEncoder": "backbones",
    "SetEncoderConfig": "backbones",
    "Estimate": "estimators",
    "estimate": "estimators",
    "InteractionLog": "log",
    "ShardedLog": "log",
    "LogTruth": "logged_truth",
    "log_truth": "logged_truth",
    "Contexts": "observations",
    "Observations": "observations",
    "pretrain": "pretraining",
    "ReplayConfig": "replay",
    "ReplayWorld": "replay",
    "Additive": "reward_baselines",
    "TitleMean": "reward_baselines",
    "UserMean": "reward_baselines",
    "reward_calibration": "reward_truth",
    "RewardEnsemble": "rewards",
    "RewardEnsembleConfig": "rewards",
    "fit_reward_ensemble": "rewards",
    "load_reward_ensemble": "rewards",
    "Evaluation": "scoring",
    "Examination": "scoring",
    "evaluate": "scoring",
    "pretrain_sequences": "sequence_pretraining",
    "Sequences": "sequences",
    "read_sequences": "sequences",
    "TrainingConfig": "training",
    "World": "world",
    "WorldConfig": "world",
}
"""Public name to the module that it lives in."""

_PACKAGES = ("agents", "benchmarks", "envs")

__all__ = [
    "HSTU",
    "Additive",
    "BackboneConfig",
    "BayesConfig",
    "BayesReference",
    "Contexts",
    "Estimate",
    "Evaluation",
    "Examination",
    "HSTUConfig",
    "InteractionLog",
    "LogTruth",
    "Observations",
    "ReplayConfig",
    "ReplayWorld",
    "RewardEnsemble",
    "RewardEnsembleConfig",
    "SASRec",
    "SASRecConfig",
    "Sequences",
    "SetEncoder",
    "SetEncoderConfig",
    "ShardedLog",
    "TitleMean",
    "TrainingConfig",
    "UserMean",
    "World",
    "WorldConfig",
    "agents",
    "benchmarks",
    "envs",
    "estimate",
    "evaluate",
    "fit_reward_ensemble",
    "load_backbone",
    "load_reward_ensemble",
    "log_truth",
    "pretrain",
    "pretrain_sequences",
    "read_sequences",
    "reward_calibration",
    "save_backbone",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded at their first use (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_environments()
