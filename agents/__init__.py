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
from recsim_gr.agents.cql import CQL
from recsim_gr.agents.ppo import PPO
from recsim_gr.agents.online_ppo import OnlinePPO
from recsim_gr.agents.truth_supervised import TruthSupervised
from recsim_gr.agents.rsdpo import RSDPO
from recsim_gr.agents.referees import Oracle, ScoreOracle
# isort: on

__all__ = [
    "AGENTS",
    "ASFT",
    "BC",
    "CQL",
    "PPO",
    "RSDPO",
    "Agent",
    "BackboneAgent",
    "InformedAgent",
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
