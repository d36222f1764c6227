"""The checks that end a run must be able to fail."""

import numpy as np
import pytest

from recsim_gr.benchmarks.first_principles import ceilings, check_first_principles, no_noise, only_noise
from recsim_gr.benchmarks.statistics import Results

AGENTS = ("BC", "RewardWeightedBC", "ASFT", "CQL", "PPO", "RSDPO", "ScoreOracle", "Oracle")
KINDS = ("sampled", "greedy", "top10")


def results(seeds: int = 10, **changes: np.ndarray) -> Results:
    """BC at 3.6, ceilings at 4.6, learners halfway at dial 0 and with BC, give or take, at dial 1."""
    rng = np.random.default_rng(0)
    bc = 3.6 + 0.05 * rng.standard_normal((2, seeds))
    values = {}
    for agent in AGENTS:
        if agent == "Oracle" or agent == "ScoreOracle":
            base = np.full((2, seeds), 4.6)
        elif agent == "BC":
            base = bc
        else:
            base = bc + np.array([[0.5], [-0.02]]) + 0.01 * rng.standard_normal((2, seeds))
        for kind in KINDS:
            values[agent, f"value_{kind}"] = base.copy()
            values[agent, f"score_value_{kind}"] = base.copy()
    for name, change in changes.items():
        values[name, "value_top10"] = values[name, "value_top10"] + change
    noise, reliability = np.array([0.0, 1.0]), np.array([0.97, 0.0])
    return Results(noise, reliability, tuple(range(seeds)), AGENTS, values)


def test_all_hold_on_a_world_that_makes_sense() -> None:
    found = results()
    lines = [*ceilings(found), *no_noise(found), *only_noise(found)]
    assert [line.split(":")[0] for line in lines] == ["holds"] * 6


def test_an_agent_above_the_oracle_fails() -> None:
    lines = ceilings(results(ASFT=np.array([[1.0], [0.0]])))
    assert lines[0].startswith("FAILS: Oracle")
    assert "-0." in lines[0]


def test_one_seed_short_of_a_tenth_fails() -> None:
    change = np.zeros((2, 10))
    change[0, 3] = -0.45  # from .5 to about .05 of a way of 1
    assert no_noise(results(CQL=change))[1].startswith("FAILS: at dial 0 CQL")


def test_a_winner_on_pure_noise_fails() -> None:
    line = only_noise(results(PPO=np.array([[0.0], [0.1]])))[0]
    assert line.startswith("FAILS")
    assert "PPO" in line


def test_the_claim_at_dial_1_is_made_where_the_score_carries_nothing() -> None:
    found = results()
    assert any("dial 1" in line for line in check_first_principles(found, True, "watch_time"))
    assert not any("dial 1" in line for line in check_first_principles(found, True, "gaussian"))
    assert len(check_first_principles(found, False, "watch_time")) == 2


@pytest.mark.parametrize("seeds", [1, 3, 9])
def test_too_few_seeds_leave_the_claim_open(seeds: int) -> None:
    assert only_noise(results(seeds))[0].startswith("open")
