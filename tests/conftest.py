"""What several tests of logs in shards share."""

from pathlib import Path

import pytest

from recsim_gr import generation
from recsim_gr.generation import Plan, generate
from recsim_gr.world import WorldConfig


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
