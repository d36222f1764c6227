"""Pretraining on real sequences and on logs, from the library and from the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsim_gr.backbones import BACKBONES, HSTUConfig, SASRecConfig
from recsim_gr.checkpoints import load_backbone
from recsim_gr.cli import USER_ERROR, main
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.leave_one_out import LeaveOneOut, backbone_scorer, held_out_nll, ranking_figures, ranks
from recsim_gr.randomness import generator
from recsim_gr.sequence_pretraining import PRESETS, Schedule, preset, pretrain_sequences
from recsim_gr.sequences import read_sequences
from recsim_gr.world import World, WorldConfig

SMALL = ["--dimensions", "8", "--max-length", "6", "--n-layers", "1"]
N_TITLES = 24


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """150 users who go round a ring of titles, now and then two at a step: order says nearly all of it."""
    rng = generator(0, "users who go round a ring")
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(150):
        places = np.cumsum(np.append(rng.integers(N_TITLES), 1 + (rng.random(9) < 0.1)))
        lines += [f"u{user}\tt{place % N_TITLES}\t{rng.integers(1, 6)}\t{3600 * k}" for k, place in enumerate(places)]
    path = tmp_path / "ring.inter"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def result_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_order_is_learned_where_it_is_all_there_is(
    name: str, ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["pretrain", "--data", str(ring), "--backbone", name, "--out", str(out), "--steps", "150"]
    command += [*SMALL, "--dropout", "0.1", "--learning-rate", "0.01"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for words in ("popularity", "item-kNN (k ", name, "NDCG@10", "tokens/s", "step 150 of 150", str(out)):
        assert words in shown
    figures = result_of(out)["figures"]
    for part in ("validation", "test"):
        found = {model: metrics["MRR"]["mean"] for model, metrics in figures[part].items()}
        assert found[name] > 0.85  # nine in ten steps are to the next title
        assert found["popularity"] < 0.4
    # what is kept is what was tested, and the titles have the names of the file
    backbone, split = load_backbone(out), LeaveOneOut(read_sequences(ring))
    again = ranking_figures(ranks(backbone_scorer(backbone), split.test))["MRR"].mean
    assert again == pytest.approx(figures["test"][name]["MRR"]["mean"])
    assert result_of(out)["test_nll"] == pytest.approx(held_out_nll(backbone, split.test))
    assert json.loads((out / "titles.json").read_text()) == split.sequences.title_names.to_pylist()
    assert result_of(out)["data"]["users_tested"] == 150


class Stop(Exception):
    """A run that is cut off."""


class CutOff:
    """An observer that ends a run at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def __call__(self, steps: int) -> "CutOff":
        return self

    def on_step(self, step: int, loss: float, tokens: int) -> None:
        self.steps += 1
        if step == self.at:
            raise Stop

    def on_check(self, step: int, objective: float) -> None:
        pass


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_run_goes_on_where_it_was_cut_off(name: str, ring: Path, tmp_path: Path) -> None:
    sequences = read_sequences(ring)
    shape = replace(preset(name).backbone, dimensions=8, max_length=6, n_layers=1)  # type: ignore[call-arg]
    schedule = Schedule(steps=12, checks=4, batch_windows=8)
    whole = pretrain_sequences(sequences, shape, schedule, tmp_path / "whole", seed=3)
    with pytest.raises(Stop):
        pretrain_sequences(sequences, shape, schedule, tmp_path / "cut", seed=3, progress=CutOff(8))
    rest = CutOff(99)
    cut = pretrain_sequences(sequences, shape, schedule, tmp_path / "cut", seed=3, progress=rest)
    assert rest.steps == 6  # from the check after six steps
    assert cut.figures == whole.figures
    assert cut.training == whole.training
    ours, theirs = (load_backbone(tmp_path / out).state_dict() for out in ("cut", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    other = pretrain_sequences(sequences, shape, schedule, tmp_path / "other", seed=4)
    assert other.training != whole.training


def test_the_same_command_again_changes_nothing(ring: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["pretrain", "--data", str(ring), "--out", str(out), "--steps", "4", *SMALL]
    assert main(command) == 0
    first, weights = result_of(out), (out / "backbone.safetensors").read_bytes()
    assert main(command) == 0
    again = result_of(out)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert (out / "backbone.safetensors").read_bytes() == weights


def test_ratings_are_read_where_they_are_wanted(ring: Path, tmp_path: Path) -> None:
    command = ["pretrain", "--data", str(ring), "--out", str(tmp_path / "run"), "--steps", "2", *SMALL]
    assert main([*command, "--scores", "True"]) == 0
    assert load_backbone(tmp_path / "run").config.scores
    bare = tmp_path / "bare.csv"
    bare.write_text("user,title,timestamp\n" + "".join(f"u,t{k},{k}\n" for k in range(5)), encoding="utf-8")
    with pytest.raises(ConfigError, match="have no ratings"):
        pretrain_sequences(read_sequences(bare), HSTUConfig(max_length=4), Schedule(steps=1), tmp_path / "bare")
    assert not (tmp_path / "bare").exists()


def test_length_zero_takes_the_longest_history(ring: Path, tmp_path: Path) -> None:
    shape = SASRecConfig(dimensions=8, max_length=0, n_layers=1, scores=False)
    pretrain_sequences(read_sequences(ring), shape, Schedule(steps=1), tmp_path / "run")
    assert load_backbone(tmp_path / "run").config.max_length == 10


def test_a_catalogue_that_is_too_large_is_sampled(ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recsim_gr import sequence_pretraining
    from recsim_gr.sampled_softmax import SoftmaxConfig

    monkeypatch.setattr(sequence_pretraining, "SoftmaxConfig", lambda: SoftmaxConfig(kind="sampled", negatives=8))
    shape = HSTUConfig(dimensions=8, max_length=6, n_layers=1, scores=False)
    found = pretrain_sequences(read_sequences(ring), shape, Schedule(steps=30), tmp_path / "run")
    assert found.training.best_objective < found.training.objectives[0][1]


@pytest.mark.parametrize("shards", [True, False])
def test_logs_are_pretrained_on_too(shards: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / ("log" if shards else "log.parquet")
    if shards:
        assert main(["generate", "--users", "60", "--titles", "30", "--out", str(data), "--history-length", "6"]) == 0
    else:
        World(WorldConfig(n_titles=30, history_length=6)).generate_log(60).write(data)
    out = tmp_path / "run"
    command = ["pretrain", "--data", str(data), "--out", str(out), "--steps", "30", "--dimensions", "8"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "30 steps; held-out NLL" in shown
    record = result_of(out)["training"]
    assert record["best_objective"] < record["objectives"][0][1]
    backbone = load_backbone(out)
    assert backbone.config.scores  # of logs a token has its score, as `recsim_gr.pretrain` has it
    assert backbone.config.max_length == 6
    assert "--repeats is for files" in mistake([*command, "--repeats", "first"], capsys)


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail as a user's mistake; its one line."""
    capsys.readouterr()
    assert main(arguments) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--backbone", "bert"], "no backbone 'bert'; there are"),
        (["--steps", "-1"], "Schedule.steps must be 0 or more"),
        (["--epochs", "0"], "Schedule.epochs must be positive"),
        (["--epochs", "1", "--steps", "1"], "--epochs and --steps"),
        (["--learning-rate", "0"], "TrainingConfig.learning_rate must be positive"),
        (["--dropout", "1"], "HSTUConfig.dropout must be in [0, 1)"),
        (["--max-length", "1"], "windows must have 2 events"),
        (["--batch", "0"], "Schedule.batch_windows must be at least 1"),
        (["--precision", "float8"], "TrainingConfig.precision must be one of"),
        (["--repeats", "last"], "repeats must be one of refuse, first"),
        (["--time-unit", "days"], "time_unit must be one of"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes(
    options: list[str], says: str, ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert says in mistake(["pretrain", "--data", str(ring), "--out", str(out), *options], capsys)
    assert not (out / "result.json").exists()


def test_another_run_is_not_written_over(ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["pretrain", "--data", str(ring), "--out", str(out), "--steps", "2", *SMALL]
    assert main(command) == 0
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for options, says in (
        (["--seed", "1"], "(seed: 0 there, 1 here)"),
        (["--dropout", "0.3"], "(shape.dropout: "),
        (["--backbone", "sasrec"], "(backbone: 'HSTUConfig' there, 'SASRecConfig' here)"),
    ):
        assert says in mistake([*command, *options], capsys)
    ring.write_text(ring.read_text() + "u0\tnew\t3\t99999\n")
    assert "(data: " in mistake(command, capsys)
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "holds no run" in mistake([*command[:-8], "--out", str(tmp_path / "mine")], capsys)
    with pytest.raises(RunDirectoryError, match="is a file"):
        pretrain_sequences(read_sequences(ring), HSTUConfig(max_length=4, scores=False), Schedule(steps=1), ring)


def test_every_backbone_has_values_of_its_own() -> None:
    assert set(PRESETS) <= set(BACKBONES)
    for name in BACKBONES:
        found = preset(name)
        assert isinstance(found.backbone, BACKBONES[name].config_type)
        assert not found.backbone.scores  # the field's usual


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_movielens(name: str, movielens: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The figures of the README, a seed of them; some minutes each."""
    command = ["pretrain", "--data", str(movielens), "--backbone", name, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    test = result_of(tmp_path / "run")["figures"]["test"]
    for metric, figure in test[name].items():
        record_property(metric, figure["mean"])
        assert figure["mean"] > 1.2 * test["item-kNN"][metric]["mean"]
        assert figure["mean"] > 2 * test["popularity"][metric]["mean"]
