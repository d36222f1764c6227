"""Saved backbones and trainings that go on: the same bits as without the stop, and named errors for the rest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recsim_gr.backbones import HSTUConfig
from recsim_gr.checkpoints import load_backbone, read_checkpoint, save_backbone, write_checkpoint
from recsim_gr.errors import CheckpointError, TrainingError
from recsim_gr.log import InteractionLog
from recsim_gr.pretraining import pretrain, pretrain_with_record
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

SHORT = TrainingConfig(steps=12, batch_users=16, warmup_steps=2, checks=4)
TINY = HSTUConfig(dimensions=8, n_layers=1)


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return World(WorldConfig(n_titles=30, history_length=8, seed=1000)).generate_log(80)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(Exception):
    """What cuts a run off."""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop_at", [3, 9])
def test_a_run_that_was_cut_off_ends_as_without(
    log: InteractionLog, tmp_path: Path, stop_at: int, precision: str
) -> None:
    training = replace(SHORT, precision=precision)
    whole, record = pretrain_with_record(log, TINY, training, seed=2)

    def stop(step: int, objective: float) -> None:
        if step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        pretrain(log, TINY, training, seed=2, after_check=stop, checkpoint=tmp_path)
    told: list[int] = []
    again, went_on = pretrain_with_record(
        log, TINY, training, seed=2, after_check=lambda step, _: told.append(step), checkpoint=tmp_path
    )
    assert told == [step for step in (3, 6, 9, 12) if step > stop_at]
    assert same(again.state_dict(), whole.state_dict())
    assert went_on == record
    told.clear()
    finished = pretrain(log, TINY, training, seed=2, after_check=lambda step, _: told.append(step), checkpoint=tmp_path)
    assert not told
    assert same(finished.state_dict(), whole.state_dict())


def test_another_run_is_refused_by_what_differs(log: InteractionLog, tmp_path: Path) -> None:
    pretrain(log, TINY, SHORT, seed=2, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="seed is 2 there and 3 here"):
        pretrain(log, TINY, SHORT, seed=3, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="learning_rate"):
        pretrain(log, TINY, replace(SHORT, learning_rate=1e-4), seed=2, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="another run: log"):
        pretrain(
            World(WorldConfig(n_titles=30, history_length=8, seed=1001)).generate_log(80),
            TINY,
            SHORT,
            seed=2,
            checkpoint=tmp_path,
        )
    with pytest.raises(CheckpointError, match="another run"):
        pretrain(log, replace(TINY, dimensions=16), SHORT, seed=2, checkpoint=tmp_path)


def test_a_damaged_one_is_named(log: InteractionLog, tmp_path: Path) -> None:
    pretrain(log, TINY, SHORT, seed=2, checkpoint=tmp_path)
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        for broken in (content[: len(content) // 2], content[:-9] + b"x" + content[-8:], b""):
            file.write_bytes(broken)
            with pytest.raises(CheckpointError, match="training"):
                pretrain(log, TINY, SHORT, seed=2, checkpoint=tmp_path)
        file.write_bytes(content)
    pretrain(log, TINY, SHORT, seed=2, checkpoint=tmp_path)


def test_a_backbone_is_what_was_saved(log: InteractionLog, tmp_path: Path) -> None:
    backbone = pretrain(log, TINY, SHORT)
    save_backbone(backbone, tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.config == backbone.config
    assert not loaded.training
    assert same(loaded.state_dict(), backbone.state_dict())
    (tmp_path / "backbone.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        load_backbone(tmp_path / "nowhere")


def test_a_pair_is_whole_at_every_moment(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "x", {"n": 1}, {"a": torch.zeros(2)})
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_checkpoint(tmp_path, "x", {"n": 2}, {"a": torch.ones(2)})
    new = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    # killed before the JSON was written, and behind it
    for json_file, expected in ((old["x.json"], 1), (new["x.json"], 2)):
        (tmp_path / "x.json").write_bytes(json_file)
        (tmp_path / "x.safetensors").write_bytes(old["x.safetensors"])
        (tmp_path / "x.next.safetensors").write_bytes(new["x.safetensors"])
        about, tensors = read_checkpoint(tmp_path, "x")
        assert about == {"n": expected}
        assert tensors["a"].tolist() == [expected - 1.0] * 2
    content = json.loads(new["x.json"])
    (tmp_path / "x.json").write_text(json.dumps(content | {"n": 3}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path, "x")


def test_a_loss_above_its_start_is_an_error(log: InteractionLog) -> None:
    with pytest.raises(TrainingError, match="diverged: its loss was"):
        pretrain(log, replace(TINY, similarity="dot"), replace(SHORT, steps=40, learning_rate=30.0))


def test_patience_ends_a_run(log: InteractionLog) -> None:
    steps = TrainingConfig(steps=400, batch_users=16, learning_rate=3e-2, warmup_steps=2, checks=40, patience=2)
    _, record = pretrain_with_record(log, TINY, steps)
    assert record.best_step + 20 == record.steps < 400
