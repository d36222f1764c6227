"""The command line: exit codes, one line a mistake, nothing overwritten."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from recsim_gr.backbones import BACKBONES, backbone_type
from recsim_gr.benchmarks.experiment import backbone_of_kind
from recsim_gr.benchmarks.suite import suite_type
from recsim_gr.cli import FAILED_CELLS, INTERRUPTED, USER_ERROR, main
from recsim_gr.configs import to_dict
from recsim_gr.log import InteractionLog, ShardedLog
from recsim_gr.world import World, WorldConfig

LANDSCAPE = ["run", "landscape", "--preset", "smoke"]
GENERATE = ["generate", "--users", "100"]


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail as a user's mistake; its one line."""
    assert main(arguments) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("recsim-gr: ")
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "landscap"], "no suite 'landscap'; there are"),
        (["run", "landscape", "--preset", "huge"], "has no preset 'huge'; it has quick"),
        ([*LANDSCAPE, "--agents", "BC", "Oracle", "GPT"], "no agent 'GPT'; there are"),
        ([*LANDSCAPE, "--agents", "ASFT"], "a list with BC in it"),
        ([*LANDSCAPE, "--noise-levels", "0", "1.5"], "between 0 and 1"),
        ([*LANDSCAPE, "--noise-levels", "nan"], "between 0 and 1"),
        ([*LANDSCAPE, "--n-titles", "0"], "n_titles must be at least 2"),
        ([*LANDSCAPE, "--history-length", "40"], "smaller than the catalogue (40 titles)"),
        ([*LANDSCAPE, "--seeds", "-1"], "integers from 0"),
        ([*LANDSCAPE, "--seeds", "1", "1"], "no repeats"),
        ([*LANDSCAPE, "--n-users", "0"], "n_users must be at least 2"),
        ([*LANDSCAPE, "--workers", "0"], "--workers must be at least 1"),
        ([*LANDSCAPE, "--world", "real"], "one of simulated, replay"),
        ([*LANDSCAPE, "--world", "replay"], "--data PATH"),
        ([*LANDSCAPE, "--data", "x.npz"], "add --world replay"),
        ([*LANDSCAPE, "--noise-model", "cauchy"], "one of watch_time, gaussian"),
        ([*LANDSCAPE, "--world-options", "cold_share"], "must be name=value"),
        ([*LANDSCAPE, "--world-options", "cold_shares=0.2"], "with a name of accept, "),
        ([*LANDSCAPE, "--world-options", "n_titles=50"], "must be name=value"),
        ([*LANDSCAPE, "--world-options", "accept=much"], "'much' is no number"),
        ([*LANDSCAPE, "--world-options", "accept=0.1", "accept=0.2"], "'accept' is given twice"),
        ([*LANDSCAPE, "--world-options", "cold_share=0.95"], "smaller than the 2 titles of the first epoch"),
        ([*LANDSCAPE, "--world-options", "duration_debiased=true", "--noise-model", "drift"], "duration_debiased must"),
        (["run", "convergence", "--agents", "BC"], "has no option --agents"),
        ([*LANDSCAPE, "--backbone", "gru4rec"], "no backbone 'gru4rec'; there are hstu, sasrec, set"),
        (["run", "throughput", "--backbone", "sasrec"], "has no option --backbone"),
        ([*GENERATE, "--titles", "1"], "WorldConfig.n_titles must be at least 2"),
        ([*GENERATE, "--reward-noise", "1.5"], "WorldConfig.reward_noise must be between 0 and 1"),
        ([*GENERATE, "--noise-model", "cauchy"], "WorldConfig.noise_model must be one of watch_time"),
        ([*GENERATE, "--history-length", "1000"], "WorldConfig.history_length must be"),
        ([*GENERATE, "--split", "holdout"], "split must be one of train, validation, test, judge"),
        ([*GENERATE, "--users", "0"], "n_users must be 1 to"),
        ([*GENERATE, "--workers", "0"], "--workers must be at least 1"),
        ([*GENERATE, "--users-per-shard", "-5"], "users_per_shard must be 0"),
    ],
)
def test_mistakes(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert says in mistake([*arguments, *out], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not an archive at all", None])
def test_bad_data_files(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "ratings.npz"
    if content is not None:
        data.write_bytes(content)
    command = [*LANDSCAPE, "--world", "replay", "--data", str(data), "--out", str(tmp_path / "out")]
    assert "ratings.npz" in mistake(command, capsys)
    assert not (tmp_path / "out").exists()


def test_a_matrix_with_too_few_titles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "ratings.npz", ratings=np.random.default_rng(0).random((100, 5)))
    command = [*LANDSCAPE, "--world", "replay", "--data", str(tmp_path / "ratings.npz")]
    assert "history_length" in mistake([*command, "--out", str(tmp_path / "out")], capsys)


def test_report_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is missing" in mistake(["report", str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in mistake(["report", str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"suite": "landscape"}')
    assert "results.parquet" in mistake(["report", str(tmp_path)], capsys)


@pytest.mark.parametrize("kind", ["truncated", "log"])
def test_report_over_foreign_results(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"suite": "landscape"}))
    log: InteractionLog = World(WorldConfig(n_titles=10, history_length=3)).generate_log(5)
    log.write(tmp_path / "results.parquet")
    if kind == "truncated":
        content = (tmp_path / "results.parquet").read_bytes()
        (tmp_path / "results.parquet").write_bytes(content[: len(content) // 2])
    assert "results.parquet" in mistake(["report", str(tmp_path)], capsys)
    assert not (tmp_path / "report.html").exists()


WORLD = ["world", "--users", "30", "--n-titles", "30", "--history-length", "4"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--users", "-5"], "2 to 200000 users, got -5"),
        (["--noise-model", "cauchy"], "noise_model must be one of watch_time, gaussian"),
        (["--reward-noise", "2"], "between 0 and 1, got 2.0"),
        (["--history-length", "30"], "smaller than the catalogue (30 titles)"),
        (["--cold-share", "0.9"], "the 3 titles of the first epoch"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--appeal-persistence", "nan"], "a finite number"),
        (["--data", "ratings.npz"], "--n-titles is for simulated worlds"),
    ],
)
def test_mistakes_in_a_world(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in mistake([*WORLD, *arguments, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_world_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*WORLD, "--noise-model", "clickbait", "--duration-debiased", "False", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("30 titles · 30 users, 120 events · clickbait noise at 0.5 · seed 0")
    assert "not calibrated" in text
    assert text.strip().endswith(f"The world: {tmp_path / 'out' / 'world.html'}")
    assert "another configuration (seed: 0 there, 1 here)" in mistake([*command, "--seed", "1"], capsys)


def test_a_world_of_real_users_has_its_own_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recsim_gr.benchmarks.world_report.portrait_figures", lambda *_: [])  # drawn elsewhere
    np.savez(tmp_path / "ratings.npz", ratings=np.random.default_rng(0).random((60, 12)))
    command = ["world", "--data", str(tmp_path / "ratings.npz"), "--history-length", "3"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "ratings replayed · 12 titles · 33 users" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (kept["pull_strength"], kept["path"], len(kept["sha256"])) == (1.0, "ratings.npz", 64)
    assert main([*command, "--pull-strength", "2", "--out", str(tmp_path / "two")]) == 0
    assert json.loads((tmp_path / "two" / "config.json").read_text(encoding="utf-8"))["pull_strength"] == 2.0


def test_every_field_of_a_world_is_an_option_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["world", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(WorldConfig):
        assert f"--{field.name.replace('_', '-')} " in text
        assert f"(default: {field.default})" in text
    assert "episodes and films." in text


def test_unknown_flags_and_commands_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fly"], ["run", "landscape", "--speed", "11"], ["run"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == USER_ERROR
    assert "Traceback" not in capsys.readouterr().err


def test_interrupting_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recsim_gr.benchmarks.runner._run_cells", interrupted)
    assert main([*LANDSCAPE, "--out", str(tmp_path / "out")]) == INTERRUPTED
    assert "goes on where it stopped" in capsys.readouterr().err


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("recsim_gr/WatchTime-v0", "recsim_gr/Replay-v0", "ASFT", "Oracle", "landscape", "convergence"):
        assert name in text


def test_landscape_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agents = ["--agents", "Random", "BC", "ASFT", "ScoreOracle", "Oracle"]
    command = [*LANDSCAPE, *agents, "--noise-levels", "0.5", "--workers", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.strip().endswith(f"The report: {tmp_path / 'out' / 'report.html'}")
    assert "holds: Oracle is first in true value" in text
    html = (tmp_path / "out" / "report.html").read_text()
    assert "ASFT" in html
    assert (tmp_path / "out" / "figures" / "landscape.svg").exists()


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_presets_sizes_carry_over_to_another_backbone(kind: str) -> None:
    suite = suite_type("landscape")
    preset = suite.preset("smoke")
    config = replace(preset, backbone=backbone_of_kind(kind, preset.backbone))
    own = backbone_type(kind).config_type()
    assert config.backbone == replace(own, **{x: getattr(preset.backbone, x) for x in ("n_layers", "dropout")})
    assert suite(config).identity()["backbone"] == {"kind": kind, **to_dict(config.backbone)}


def test_another_backbone_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agents = ["--agents", "BC", "Oracle"]
    command = [*LANDSCAPE, *agents, "--noise-levels", "0.5", "--workers", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--backbone", "sasrec"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["backbone"]["kind"] == "sasrec"
    capsys.readouterr()
    assert "backbone" in mistake(command, capsys)  # the same directory, with the preset's own


def test_failed_cells_exit_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(suite: object, todo: list, *_: object) -> dict[str, str]:
        return {cell.name: "MemoryError: no room" for cell in todo}

    monkeypatch.setattr("recsim_gr.benchmarks.runner._run_cells", crash)
    assert main([*LANDSCAPE, "--out", str(tmp_path / "out")]) == FAILED_CELLS
    assert "noise-0-seed-0 FAILED: MemoryError: no room" in capsys.readouterr().out


def test_generate_and_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*GENERATE, "--titles", "40", "--reward-noise", "0.2", "--taste-dimensions", "3", "--seed", "7"]
    command += ["--history-length", "5", "--workers", "1", "--propensities", "--out", str(tmp_path / "logs")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "100 users in 1 shards to make: about " in text
    assert text.endswith(f"100 users, 500 events, 0.0 MB. The log: {tmp_path / 'logs'}\n")
    world = World(WorldConfig(n_titles=40, reward_noise=0.2, taste_dimensions=3, seed=7, history_length=5))
    expected, log = world.generate_log(100, expose_propensities=True), InteractionLog.open(tmp_path / "logs")
    assert isinstance(log, ShardedLog)
    again = log.read()
    assert again.score.tobytes() == expected.score.tobytes()
    assert again.require_propensities().tobytes() == expected.require_propensities().tobytes()
    assert again.provenance == expected.provenance
    assert main(command) == 0
    assert "1 of 1 shards are finished already and are kept." in capsys.readouterr().out
    assert "another log (seed: 7 there, 8 here)" in mistake([*command, "--seed", "8"], capsys)


def test_generate_shows_no_propensities_unasked(tmp_path: Path) -> None:
    assert main([*GENERATE, "--titles", "30", "--workers", "1", "--out", str(tmp_path / "logs")]) == 0
    log = InteractionLog.open(tmp_path / "logs")
    assert isinstance(log, ShardedLog)
    assert log.read().propensities is None


def test_generate_explains_every_field_of_the_world(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in (*(field.name for field in fields(WorldConfig)), "users", "workers", "propensities", "users_per_shard"):
        assert f"--{'titles' if name == 'n_titles' else name.replace('_', '-')}" in text
    assert "--n-titles" not in text
