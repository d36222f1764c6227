"""What several tests share."""

import os
import sys
from pathlib import Path

import pytest
import torch

from recsim_gr import generation
from recsim_gr.generation import Plan, generate
from recsim_gr.world import WorldConfig

torch.set_num_threads(1)  # tensors here are tiny: a second thread waits more than it works, most of all beside others


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of five users of four events, so that small logs have many."""
    monkeypatch.setattr(generation, "PART_EVENTS", 20)


@pytest.fixture
def made(tmp_path: Path, small_parts: None) -> Path:
    """A log of 50 users in five shards of three parts, the last of one."""
    world = WorldConfig(n_titles=30, history_length=4, seed=3)
    generate(Plan(world=world, n_users=50, users_per_shard=12, propensities=True), tmp_path / "log")
    return tmp_path / "log"


@pytest.fixture(scope="session")
def movielens() -> Path:
    """MovieLens-100K, where it is: RecBole's wheel carries it, and RECSIM_GR_DATA may name the folder of either."""
    inside = "recbole/dataset_example/ml-100k/ml-100k.inter"
    data = Path(os.environ.get("RECSIM_GR_DATA") or Path(__file__).parents[2] / "shared" / "realdata")
    installed = [Path(folder) / inside for folder in sys.path if folder]
    for path in (data / "ml-100k.inter", data / inside, *installed):
        if path.is_file():
            return path
    pytest.skip(
        "ml-100k.inter is not here; RECSIM_GR_DATA names the folder that has it, or into which RecBole was installed: "
        "pip install --no-deps --target FOLDER recbole==1.2.1"
    )
