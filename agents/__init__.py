"""The algorithms, one file each."""

if __name__ != "recsim_gr.agents":
    raise ImportError(f"import recsim_gr.agents instead of {__name__}")

# In the order in which tables show them: baselines, learners, ceilings.
# isort: off
from recsim_gr.agents.base import (
    AGENTS,
    Agent,
    BackboneAgent,
    InformedAgent,
    Strength,
    agent_type,
    find_agent,
    load_agent,
    register,
)
from recsim_gr.agents.baselines import Pretrained, Popularity, Random
from recsim_gr.agents.bc import BC
from recsim_gr.agents.reward_weighted_bc import RewardWeightedBC
from recsim_gr.agents.asft import ASFT
from recsim_gr.agents.exp_rsft import ExpRSFT
from recsim_gr.agents.filtered_bc import FilteredBC
from recsim_gr.agents.conditioned_bc import ConditionedBC
from recsim_gr.agents.cql import CQL
from recsim_gr.agents.ips import IPS
from recsim_gr.agents.doubly_robust import DoublyRobust
from recsim_gr.agents.ppo import PPO
from recsim_gr.agents.grpo import GRPO
from recsim_gr.agents.off_policy_reinforce import GroupREINFORCE
from recsim_gr.agents.online_ppo import OnlinePPO
from recsim_gr.agents.truth_supervised import TruthSupervised
from recsim_gr.agents.rsdpo import RSDPO
from recsim_gr.agents.rsipo import RSIPO
from recsim_gr.agents.iterative_dpo import IterativeDPO
from recsim_gr.agents.referees import Oracle, ScoreOracle
# isort: on

__all__ = [
    "AGENTS",
    "ASFT",
    "BC",
    "CQL",
    "GRPO",
    "IPS",
    "PPO",
    "RSDPO",
    "RSIPO",
    "Agent",
    "BackboneAgent",
    "ConditionedBC",
    "DoublyRobust",
    "ExpRSFT",
    "FilteredBC",
    "GroupREINFORCE",
    "InformedAgent",
    "IterativeDPO",
    "OnlinePPO",
    "Oracle",
    "Popularity",
    "Pretrained",
    "Random",
    "RewardWeightedBC",
    "ScoreOracle",
    "Strength",
    "TruthSupervised",
    "agent_type",
    "find_agent",
    "load_agent",
    "register",
]
