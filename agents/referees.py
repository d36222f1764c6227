"""Referees: policies that know the user. Ceilings for the others, never competitors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsim_gr.agents.base import Agent, register
from recsim_gr.errors import PolicyError
from recsim_gr.observations import Observations
from recsim_gr.policy import Truth


class RefereeAgent(Agent):
    """Ranks by what scoring hands it of the truth; it cannot act on observations alone."""

    referee = True

    def true_scores(self, truth: Truth, users: NDArray[np.int64]) -> NDArray[Any]:
        """(n, I): what it ranks by."""
        raise NotImplementedError

    def log_probs(self, observations: Observations) -> NDArray[np.float32]:
        raise PolicyError(f"{self.name} knows users and cannot act on observations alone; use world.evaluate")


@register
class ScoreOracle(RefereeAgent):
    """argmax of E[score|u,a]: the ceiling of every reward model."""

    name = "ScoreOracle"
    uses_rewards = True

    def true_scores(self, truth: Truth, users: NDArray[np.int64]) -> NDArray[Any]:
        return truth.expected_score(users)


@register
class Oracle(RefereeAgent):
    """argmax of s(u,a): the ceiling."""

    name = "Oracle"

    def true_scores(self, truth: Truth, users: NDArray[np.int64]) -> NDArray[Any]:
        return truth.worth(users)
