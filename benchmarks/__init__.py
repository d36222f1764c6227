"""The suites, their runner and their report."""

if __name__ != "recsim_gr.benchmarks":
    raise ImportError(f"import recsim_gr.benchmarks instead of {__name__}")

from recsim_gr.benchmarks.convergence import Convergence
from recsim_gr.benchmarks.headroom import Headroom
from recsim_gr.benchmarks.landscape import Landscape
from recsim_gr.benchmarks.noise_bounds import NoiseBounds
from recsim_gr.benchmarks.offline import Offline
from recsim_gr.benchmarks.reward_model import RewardModel
from recsim_gr.benchmarks.suite import SUITES, Suite
from recsim_gr.benchmarks.throughput import Throughput

__all__ = [
    "SUITES",
    "Convergence",
    "Headroom",
    "Landscape",
    "NoiseBounds",
    "Offline",
    "RewardModel",
    "Suite",
    "Throughput",
]
