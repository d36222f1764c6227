"""Behaviour cloning (supervised finetuning, SFT): imitation continued, what every other agent is compared with."""

from torch import Tensor

from recsim_gr.agents.base import BackboneAgent, Problem, masked_mean, register
from recsim_gr.backbones import Backbone
from recsim_gr.histories import Batch
from recsim_gr.prefixes import prefix_log_probs


def bc_loss(log_probs: Tensor) -> Tensor:
    """−log π(a|x), per example.

    Args:
        log_probs: (B, T) log π of the logged titles.
    """
    if log_probs.ndim != 2:
        raise ValueError(f"bc_loss takes (B, T) log-probabilities, got {tuple(log_probs.shape)}")
    return -log_probs


@register
class BC(BackboneAgent):
    """−log π(a|x), with the steps, batches and schedule of every other agent."""

    name = "BC"

    def batch_loss(self, policy: Backbone, batch: Batch, problem: Problem) -> Tensor:
        return masked_mean(bc_loss(prefix_log_probs(policy, batch)), batch)
