"""Suite headroom: its arithmetic on a table worked out by hand, and a small run from end to end."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from recsim_gr.benchmarks import Headroom
from recsim_gr.benchmarks.headroom import figure, parts, summary
from recsim_gr.benchmarks.runner import run
from recsim_gr.benchmarks.statistics import WORLD, Results
from recsim_gr.errors import ConfigError, RunDirectoryError

# Two dials, two seeds. Unobservable: .5, .7 and 1, 1; unlearned by BC: .3, .1 and .2, .4.
VALUES = {
    ("Oracle", "value_top10"): [[4.5, 4.5], [4.5, 4.5]],
    (WORLD, "bayes_value_top10"): [[4.0, 3.8], [3.5, 3.5]],
    ("BC", "value_top10"): [[3.7, 3.7], [3.3, 3.1]],
    (WORLD, "bayes_nll"): [[4.0, 4.2], [4.0, 4.2]],
    (WORLD, "bayes_entropy"): [[4.1, 4.1], [4.1, 4.1]],
    ("Pretrained", "nll"): [[4.3, 4.5], [4.3, 4.5]],
}


def by_hand(**changes: float) -> Results:
    values = {key: np.array(table) for key, table in VALUES.items()}
    for name, value in changes.items():
        values[(name, "value_top10")] = np.full((2, 2), value)
    agents = ("BC", *changes, "Oracle")
    return Results(np.array([0.0, 1.0]), np.array([0.97, 0.01]), (0, 1), agents, values)


def test_the_two_parts_add_up_to_the_distance_to_oracle() -> None:
    unobservable, unlearned = parts(by_hand())
    assert unobservable == pytest.approx(np.array([[0.5, 0.7], [1.0, 1.0]]))
    assert list(unlearned) == ["BC"]  # a referee is no agent
    assert unlearned["BC"] == pytest.approx(np.array([[0.3, 0.1], [0.2, 0.4]]))


def test_summary_says_the_parts_with_their_intervals() -> None:
    lines = summary(by_hand())
    assert lines[0].startswith("dial 0 (reliability 0.97): Oracle 4.500, Bayes 3.900: unobservable +0.600 ± 1.271")
    assert "BC +0.200 ± 1.271" in lines[1]  # t(.975, 1) = 12.706, standard error .1
    assert "floor 4.100, backbone 4.400: short by +0.300" in lines[2]
    assert lines[-1] == "holds: over all worlds no agent beats Bayes (closest BC, +0.250)"
    assert summary(by_hand(Clairvoyant=4.2))[-1].startswith("FAILS")


def test_bars_begin_where_the_other_part_ends() -> None:
    rows = figure(by_hand(), "").spec["datasets"]["parts"]
    assert [(r["start"], r["end"]) for r in rows if r["level"] == 0] == [
        (0.0, pytest.approx(0.6)),
        (pytest.approx(0.6), pytest.approx(0.8)),
    ]


def test_a_table_of_another_suite_is_refused() -> None:
    results = by_hand()
    with pytest.raises(RunDirectoryError, match="Oracle and Bayes"):
        parts(replace(results, values={("Oracle", "value_top10"): np.ones((2, 2))}))


def test_what_has_no_law_is_refused() -> None:
    with pytest.raises(ConfigError, match="simulated"):
        replace(Headroom.preset("smoke"), world="replay", data="x.npz")
    with pytest.raises(ConfigError, match="Pretrained"):
        replace(Headroom.preset("smoke"), agents=("BC", "Oracle"))


def test_a_small_run(tmp_path: Path) -> None:
    config = replace(
        Headroom.preset("smoke"), noise_levels=(1.0,), test_contexts=20, agents=("Pretrained", "BC", "Oracle")
    )
    outcome = run(Headroom(config), tmp_path / "run", workers=1, console=Console(file=StringIO()))
    assert outcome.failures == []
    assert (tmp_path / "run" / "headroom.txt").read_text().startswith("dial 1")
    assert (tmp_path / "run" / "figures" / "headroom.svg").read_text().count("unobservable") > 0
    assert (tmp_path / "run" / "figures" / "headroom.png").stat().st_size > 10_000
