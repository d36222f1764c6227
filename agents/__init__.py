"""The algorithms, one file each."""

if __name__ != "recsim_gr.agents":
    raise ImportError(f"import recsim_gr.agents instead of {__name__}")

# In the order in which tables show them: baselines, learners, ceilings.
from recsim_gr.agents.base import AGENTS, Agent, BackboneAgent, agent_type, load_agent, register
from recsim_gr.agents.baselines import Pretrained, Popularity, Random  # isort: skip
from recsim_gr.agents.bc import BC  # isort: skip
from recsim_gr.agents.reward_weighted_bc import RewardWeightedBC  # isort: skip
from recsim_gr.agents.asft import ASFT  # isort: skip
from recsim_gr.agents.cql import CQL  # isort: skip
from recsim_gr.agents.ppo import PPO  # isort: skip
from recsim_gr.agents.rsdpo import RSDPO  # isort: skip
from recsim_gr.agents.referees import Oracle, ScoreOracle  # isort: skip

__all__ = [
    "AGENTS",
    "ASFT",
    "BC",
    "CQL",
    "PPO",
    "RSDPO",
    "Agent",
    "BackboneAgent",
    "Oracle",
    "Popularity",
    "Pretrained",
    "Random",
    "RewardWeightedBC",
    "ScoreOracle",
    "agent_type",
    "load_agent",
    "register",
]
