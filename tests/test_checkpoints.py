"""Saved models and trainings: round trips, every kind of damage, and runs that are killed and go on, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsim_gr
from recsim_gr import checkpoints, generation
from recsim_gr.backbones import BACKBONES, Backbone, HSTUConfig, TitleMetadata, new_backbone
from recsim_gr.catalogue import Catalogue
from recsim_gr.checkpoints import (
    load_backbone,
    read_checkpoint,
    save_backbone,
    save_tensors,
    tensors_under,
    write_checkpoint,
)
from recsim_gr.errors import CheckpointError, RunDirectoryError, TrainingError
from recsim_gr.generation import Plan, generate
from recsim_gr.histories import Histories, HistorySource, ShardedHistories
from recsim_gr.log import AnyLog, InteractionLog, ShardedLog
from recsim_gr.pretraining import pretrain, pretrain_with_record
from recsim_gr.randomness import generator
from recsim_gr.sampled_softmax import SoftmaxConfig
from recsim_gr.training import TrainingConfig, TrainingRecord, train
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)

STEPS = TrainingConfig(steps=12, batch_users=8, learning_rate=1e-2, warmup_steps=2, checks=3)
SMALL = HSTUConfig(dimensions=8, n_layers=1)
WORLD = WorldConfig(n_titles=25, history_length=6, history_median=4, cold_share=0.2, reward_noise=0.0, seed=5)


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return World(WORLD).generate_log(60)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardedLog:
    """120 users in parts of 10 or fewer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PART_EVENTS", 60)
        return generate(Plan(world=WORLD, n_users=120, users_per_shard=30), tmp_path_factory.mktemp("log"))


# -- pairs of files ----------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name in draw(st.lists(st.text("ab.é", min_size=1, max_size=5), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        found[name] = torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES)))
    return found


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@PROPERTY
@given(tensors=named_tensors(), about=st.dictionaries(st.text("xyz", max_size=3), JSON, max_size=3))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], about: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint") / "not" / "there"
    write_checkpoint(directory, "thing", about, tensors)
    found = read_checkpoint(directory, "thing")
    assert found.about == about
    assert_same(found.tensors, tensors)
    assert {path.name for path in directory.iterdir()} == {"thing.json", "thing.safetensors"}


def test_tensors_may_overlap_want_gradients_and_be_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    tensors = {"all": base, "some": base[1:], "turned": base.T, "number": base[0, 1]}
    write_checkpoint(tmp_path, "views", {}, tensors)
    assert_same(read_checkpoint(tmp_path, "views").tensors, {name: x.detach() for name, x in tensors.items()})
    assert tensors_under("a", tensors).keys() == {"ll"}


@pytest.mark.parametrize("file", ["thing.json", "thing.safetensors"])
def test_any_changed_byte_is_noticed(file: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "thing", {"step": 40, "rate": 0.1}, {"weights": torch.arange(5.0)})
    whole = (tmp_path / file).read_bytes()
    rng = np.random.default_rng(0)
    for place in sorted({0, len(whole) - 1, *rng.integers(len(whole), size=60).tolist()}):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        (tmp_path / file).write_bytes(changed)
        try:
            found = read_checkpoint(tmp_path, "thing")
        except CheckpointError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
        else:  # blanks between JSON values are no content
            assert found.about == {"step": 40, "rate": 0.1}
            assert file == "thing.json"
            assert whole[place : place + 1].isspace()
    for length in (0, 1, len(whole) // 2, len(whole) - 2):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"{file}.*(damaged|cannot be read)"):
            read_checkpoint(tmp_path, "thing")
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file} is missing"):
        read_checkpoint(tmp_path, "thing")


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"sha256": 3}', "[" * 99_999, '{"a": 1e999}'])
def test_foreign_json_is_refused(content: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "thing", {}, {})
    (tmp_path / "thing.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"thing\.json"):
        read_checkpoint(tmp_path, "thing")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SCHEMA_VERSION", 99)
    write_checkpoint(tmp_path, "thing", {}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99, and this code reads 1"):
        read_checkpoint(tmp_path, "thing")


def test_what_is_no_json_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "thing", {"old": 1}, {"x": torch.ones(1)})
    worse: list[dict[str, Any]] = [{"loss": float("nan")}, {"sha256": "mine"}, {"tensors": {}}]
    for about in worse:
        with pytest.raises(ValueError, match=r"JSON|writes '"):
            write_checkpoint(tmp_path, "thing", about, {"x": torch.zeros(1)})
        assert read_checkpoint(tmp_path, "thing").about == {"old": 1}


class Killed(BaseException):
    """Like a signal: nothing catches it."""


@pytest.mark.parametrize("moments", [("tensors",), ("json",), ("rename",), ("rename", "json"), ("rename", "rename")])
def test_a_writer_that_is_killed_leaves_the_old_pair_or_the_new_one(
    moments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the tensors stand, before the JSON does, or before the last renaming; also twice in a row."""

    def content() -> tuple[Any, float]:
        found = read_checkpoint(tmp_path, "thing")
        return found.about["n"], found.tensors["n"].item()

    def stop(*_: Any) -> None:
        raise Killed

    write_checkpoint(tmp_path, "thing", {"n": 0}, {"n": torch.tensor(0.0)})
    standing = 0
    for n, moment in enumerate(moments, start=1):
        with monkeypatch.context() as patch:
            if moment == "rename":
                rename = Path.replace

                def replaced(path: Path, target: Path) -> Path:
                    # the first renaming of a writer who finds an unfinished one finishes that
                    done = path.name == "thing.next.safetensors" and content() == (n, float(n))  # noqa: B023
                    if done:
                        raise Killed
                    return rename(path, target)  # noqa: B023

                patch.setattr(Path, "replace", replaced)
                standing = n
            else:
                patch.setattr(checkpoints, "save_tensors" if moment == "tensors" else "write_text", stop)
            with pytest.raises(Killed):
                write_checkpoint(tmp_path, "thing", {"n": n}, {"n": torch.tensor(float(n))})
        assert content() == (standing, float(standing))
    write_checkpoint(tmp_path, "thing", {"n": 9}, {"n": torch.tensor(9.0)})
    assert content() == (9, 9.0)
    assert {path.name for path in tmp_path.iterdir()} == {"thing.json", "thing.safetensors"}


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (write_checkpoint, lambda directory, *_: save_backbone(new_backbone(SHAPES[0], 3), directory)):
        with pytest.raises(RunDirectoryError, match="cannot write"):
            write(tmp_path / "file", "thing", {}, {})
    with pytest.raises(RunDirectoryError, match="cannot write"):
        save_tensors(tmp_path / "file" / "x.safetensors", {})


# -- backbones ---------------------------------------------------------------------------------------------------

SHAPES = [kind.config_type(dimensions=8, max_length=4) for kind in BACKBONES.values()]


def backbone_of(config: Any, n_titles: int, cold: bool) -> Backbone:
    metadata = None
    if cold:
        catalogue = Catalogue(
            np.arange(n_titles) % 3, np.linspace(20, 90, n_titles, dtype=np.float32), np.arange(n_titles) % 2
        )
        metadata = TitleMetadata(catalogue, np.arange(n_titles) > 1, config.dimensions, config.id_dropout)
    return new_backbone(config, n_titles, metadata)


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("cold", [False, True])
def test_a_backbone_is_saved_and_loaded(config: Any, cold: bool, tmp_path: Path) -> None:
    backbone = backbone_of(config, 7, cold)
    recsim_gr.save_backbone(backbone, tmp_path / "b")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = recsim_gr.load_backbone(str(tmp_path / "b"))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(backbone)
    assert loaded.config == config
    assert not loaded.training
    assert_same(loaded.state_dict(), backbone.state_dict())
    assert json.loads((tmp_path / "b" / "backbone.json").read_text())["backbone"]["kind"] == backbone.name


def test_what_holds_no_backbone_is_refused(tmp_path: Path) -> None:
    backbone = new_backbone(SHAPES[0], 7)
    shape, state = backbone.shape(), backbone.state_dict()
    worse: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({}, state),
        ({"backbone": None}, state),
        ({"backbone": shape | {"kind": "nobody"}}, state),
        ({"backbone": shape | {"n_titles": 8}}, state),
        ({"backbone": shape | {"n_titles": -1}}, state),
        ({"backbone": shape | {"config": {"colour": 3}}}, state),
        ({"backbone": shape | {"config": shape["config"] | {"n_heads": 3}}}, state),
        ({"backbone": shape}, {}),
        ({"backbone": shape}, state | {"more": torch.ones(2)}),
    ]
    for about, tensors in worse:
        write_checkpoint(tmp_path, "backbone", about, tensors)
        with pytest.raises(CheckpointError, match="holds no backbone that can be loaded"):
            load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match="is missing"):
        load_backbone(tmp_path / "nowhere")


# -- batches that are passed over --------------------------------------------------------------------------------


def sources(log: InteractionLog, shards: ShardedLog) -> dict[str, Callable[[], HistorySource]]:
    return {
        "memory": lambda: Histories(log),
        "resampled": lambda: Histories(log).resampled(3, "resample"),
        "shards": lambda: ShardedHistories(shards),
        "some shards": lambda: ShardedHistories(shards.users(7, 95)),
        "resampled shards": lambda: ShardedHistories(shards).resampled(3, "resample"),
    }


@PROPERTY
@given(
    size=st.integers(1, 130),
    skip=st.integers(0, 60),
    name=st.sampled_from(["memory", "resampled", "shards", "some shards", "resampled shards"]),
)
def test_batches_are_passed_over_as_if_they_had_been_taken(
    log: InteractionLog, shards: ShardedLog, size: int, skip: int, name: str
) -> None:
    histories = sources(log, shards)[name]()
    skip = min(skip, 4 * len(histories) // size + 2)
    taken = islice(histories.batches(size, generator(0, "batches")), skip, skip + 3)
    for batch, other in zip(taken, histories.batches(size, generator(0, "batches"), skip), strict=False):
        for one, two in zip(batch, other, strict=True):
            assert (one is None) == (two is None)
            assert one is None or two is None or torch.equal(one, two)


@pytest.mark.parametrize("size", [1, 7, 25, 120])
def test_windows_hand_users_out_as_they_are_shuffled(size: int, shards: ShardedLog) -> None:
    """Against a loop over lists of users: four parts at a time, shuffled with what was left of those before."""
    rng, expected = generator(2, "batches"), []
    starts = np.append(0, np.cumsum(shards.part_users))
    for _ in range(2):
        order = rng.permutation(len(starts) - 1)
        left: list[int] = []
        for first in range(0, len(order), 4):
            window = left + [u for part in order[first : first + 4] for u in range(starts[part], starts[part + 1])]
            window = [window[place] for place in rng.permutation(len(window))]
            full = len(window) // size * size
            expected += [window[start : start + size] for start in range(0, full, size)]
            left = window[full:]
    batches = ShardedHistories(shards).batches(size, generator(2, "batches"))
    assert [next(batches).rows.tolist() for _ in expected] == expected


def test_passing_over_reads_only_what_comes_next(shards: ShardedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    histories, read = ShardedHistories(shards), []
    load = histories._load
    monkeypatch.setattr(histories, "_load", lambda part: read.append(part) or load(part))  # type: ignore[func-returns-value]
    next(histories.batches(8, generator(0, "batches"), 1_000))
    assert 1 <= len(read) <= 8  # of twelve: a window of four, and what the one before has left


def test_equal_histories_have_equal_fingerprints(log: InteractionLog, shards: ShardedLog) -> None:
    found = {name: make().fingerprint for name, make in sources(log, shards).items()}
    assert found == {name: make().fingerprint for name, make in sources(log, shards).items()}
    other = replace(log, score=np.where(np.arange(len(log)) == 3, 1.5, log.score))
    moved = replace(log, hours=log.hours + 1)
    more = [
        Histories(other).fingerprint,
        Histories(moved).fingerprint,
        Histories(replace(log, catalogue=None)).fingerprint,
        Histories(log.rows(slice(0, int(np.flatnonzero(log.step == 0)[-1])))).fingerprint,
        Histories(log).resampled(4, "resample").fingerprint,
    ]
    assert len({*found.values(), *more}) == len(found) + len(more)


# -- runs that go on ---------------------------------------------------------------------------------------------


class Watcher:
    """Kills the run after some step, and writes down what it is told."""

    def __init__(self, last: int = -1) -> None:
        self.last = last
        self.steps: list[tuple[int, float, int]] = []
        self.checks: list[tuple[int, float]] = []

    def on_step(self, step: int, loss: float, tokens: int) -> None:
        self.steps.append((step, loss, tokens))
        if step == self.last:
            raise Killed

    def on_check(self, step: int, objective: float) -> None:
        self.checks.append((step, objective))


Run = Callable[..., tuple[Backbone, TrainingRecord]]


def run_of(log: AnyLog, training: TrainingConfig = STEPS, softmax: SoftmaxConfig | None = None) -> Run:
    def run(**options: Any) -> tuple[Backbone, TrainingRecord]:
        return pretrain_with_record(log, SMALL, training, seed=3, softmax=softmax, **options)

    return run


def assert_goes_on(run: Run, directory: Path, kills: tuple[int, ...]) -> None:
    """Killed after these steps, it ends as if it had not been."""
    whole = Watcher()
    backbone, record = run(progress=whole)
    told: dict[int, tuple[int, float, int]] = {}
    for last in (*kills, -1):
        torch.rand(3)  # whatever else has drawn random numbers meanwhile
        watcher = Watcher(last)
        if last > 0:
            with pytest.raises(Killed):
                run(checkpoint=directory, progress=watcher)
        else:
            again, record_again = run(checkpoint=directory, progress=watcher)
        told |= {step[0]: step for step in watcher.steps}
    assert_same(again.state_dict(), backbone.state_dict())
    assert asdict(record_again) == asdict(record)
    assert [told[step] for step in sorted(told)] == whole.steps
    assert not again.training


@settings(max_examples=6, deadline=None, derandomize=True)
@given(kills=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(sorted))
def test_a_run_killed_after_any_steps_ends_as_if_it_had_not_been(
    log: InteractionLog, tmp_path_factory: pytest.TempPathFactory, kills: list[int]
) -> None:
    # killed once more only after a step that it has not passed yet
    reached = [kill for kill, before in zip(kills, [0, *kills], strict=False) if kill > before // 4 * 4]
    assert_goes_on(run_of(log), tmp_path_factory.mktemp("run") / "checkpoint", tuple(reached))


@pytest.mark.parametrize(
    "options",
    [
        {"training": replace(STEPS, precision="bfloat16")},
        {"training": replace(STEPS, patience=2, learning_rate=1e-4, checks=6)},
        {"softmax": SoftmaxConfig(kind="sampled", negatives=8)},
    ],
    ids=["bfloat16", "patience", "sampled"],
)
def test_it_goes_on_the_same_in_every_mode(options: dict[str, Any], log: InteractionLog, tmp_path: Path) -> None:
    assert_goes_on(run_of(log, **options), tmp_path, (5, 11))


def test_it_goes_on_from_shards(shards: ShardedLog, tmp_path: Path) -> None:
    assert_goes_on(run_of(shards), tmp_path, (4, 6))


class Descent(torch.nn.Module):
    """A number that falls by the rate at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))

    def descend(self, log: InteractionLog, **options: Any) -> TrainingRecord:
        steps = replace(STEPS, learning_rate=0.1, warmup_steps=0, checks=6)
        past = lambda: abs(self.place.item() + 0.3)  # noqa: E731
        return train(self, lambda batch: self.place, past, Histories(log), steps, 0, "descent", **options)


def test_a_best_state_that_lies_behind_is_kept(log: InteractionLog, tmp_path: Path) -> None:
    whole, killed, again = Descent(), Descent(), Descent()
    record = whole.descend(log)
    assert record.best_step == 4
    with pytest.raises(Killed):
        killed.descend(log, checkpoint=tmp_path, progress=Watcher(9))
    assert again.descend(log, checkpoint=tmp_path) == record
    assert again.place.item() == whole.place.item()
    assert again.place.item() == pytest.approx(-0.3, abs=0.1)


def test_an_observer_that_raises_at_a_check_has_lost_nothing(log: InteractionLog, tmp_path: Path) -> None:
    def stop(step: int, objective: float) -> None:
        raise Killed

    run = run_of(log)
    backbone, record = run()
    for _ in range(3):
        with pytest.raises(Killed):
            run(checkpoint=tmp_path, after_check=stop)
    again, record_again = run(checkpoint=tmp_path, after_check=stop)  # all three checks are behind it
    assert_same(again.state_dict(), backbone.state_dict())
    assert record_again == record


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    from recsim_gr.backbones import HSTUConfig
    from recsim_gr.log import InteractionLog
    from recsim_gr.pretraining import pretrain
    from recsim_gr.training import TrainingConfig

    class Killer:
        def on_check(self, step, objective): pass
        def on_step(self, step, loss, tokens):
            if step == 10:
                os.kill(os.getpid(), signal.SIGKILL)

    steps = TrainingConfig(steps=12, batch_users=8, learning_rate=1e-2, warmup_steps=2, checks=3)
    log = InteractionLog.open(sys.argv[1])
    pretrain(log, HSTUConfig(dimensions=8, n_layers=1), steps, seed=3, checkpoint=sys.argv[2], progress=Killer())
"""


def test_a_process_that_is_killed_goes_on_in_another(log: InteractionLog, tmp_path: Path) -> None:
    log.write(tmp_path / "log.parquet")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "log.parquet"), str(tmp_path / "run")]
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    watcher = Watcher()
    again, record = run_of(log)(checkpoint=tmp_path / "run", progress=watcher)
    assert [step for step, _, _ in watcher.steps] == [9, 10, 11, 12]
    backbone, expected = run_of(log)()
    assert_same(again.state_dict(), backbone.state_dict())
    assert record == expected


def test_a_finished_run_returns_at_once(log: InteractionLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(log)
    backbone, record = run(checkpoint=tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"training.json", "training.safetensors"}

    def no_more(*_: Any) -> Iterator[Any]:
        raise AssertionError("it is finished")
        yield

    monkeypatch.setattr(Histories, "batches", no_more)
    monkeypatch.setattr("recsim_gr.pretraining.negative_log_likelihood", no_more)
    again, record_again = run(checkpoint=tmp_path)
    assert_same(again.state_dict(), backbone.state_dict())
    assert record_again == record
    assert not again.training
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.fixture(scope="module")
def kept(log: InteractionLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle."""
    directory = tmp_path_factory.mktemp("kept")
    with pytest.raises(Killed):
        run_of(log)(checkpoint=directory, progress=Watcher(9))
    return directory


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("seed is 3 there and 4 here", {"seed": 4}),
        (r"training\.learning_rate is 0\.01 there and 0\.02 here", {"training": replace(STEPS, learning_rate=2e-2)}),
        (r"training\.precision is 'float32' there", {"training": replace(STEPS, precision="bfloat16")}),
        (r"training\.steps is 12 there and 13 here", {"training": replace(STEPS, steps=13)}),
        (r"backbone\.config\.dimensions is 8 there and 16 here", {"config": HSTUConfig(dimensions=16, n_layers=1)}),
        (r"softmax\.kind is 'auto' there and 'full' here", {"softmax": SoftmaxConfig(kind="full")}),
        ("log is '", {"users": (0, 55)}),
        ("validation is '", {"validation": (50, 60)}),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    field: str, options: dict[str, Any], log: InteractionLog, kept: Path, tmp_path: Path
) -> None:
    cuts = np.append(np.flatnonzero(log.step == 0), len(log))

    def users(first: int, last: int) -> InteractionLog:
        return log.rows(slice(int(cuts[first]), int(cuts[last])))

    directory = shutil.copytree(kept, tmp_path / "copy")
    wanted: dict[str, Any] = {"config": SMALL, "training": STEPS, "seed": 3, **options}
    part = users(*wanted.pop("users", (0, 60)))
    if "validation" in wanted:
        part, wanted["validation"] = users(0, 54), users(*wanted["validation"])
    with pytest.raises(CheckpointError, match=f"checkpoint of another run: {field}"):
        pretrain(part, **wanted, checkpoint=directory)
    assert (directory / "training.json").read_bytes() == (kept / "training.json").read_bytes()


@pytest.mark.parametrize("file", ["training.json", "training.safetensors"])
def test_a_damaged_checkpoint_is_named_and_never_begun_anew(
    file: str, log: InteractionLog, kept: Path, tmp_path: Path
) -> None:
    def damaged(change: Callable[[Path], object], message: str) -> None:
        directory = Path(shutil.copytree(kept, tmp_path / "copy"))
        change(directory / file)
        watcher = Watcher()
        with pytest.raises(CheckpointError, match=message):
            run_of(log)(checkpoint=directory, progress=watcher)
        assert watcher.steps == []
        shutil.rmtree(directory)

    whole = (kept / file).read_bytes()
    damaged(lambda path: path.write_bytes(whole[: len(whole) // 2]), file)
    damaged(lambda path: path.write_bytes(whole.replace(b"0", b"1", 5)), file)
    damaged(lambda path: path.write_bytes(b""), file)
    damaged(Path.unlink, f"{file} is missing")


def test_checkpoints_of_something_else_are_refused(log: InteractionLog, kept: Path, tmp_path: Path) -> None:
    run = run_of(log)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; a checkpoint takes a directory"):
        run(checkpoint=tmp_path / "file")
    about, tensors = read_checkpoint(kept, "training")
    fewer = {name: x for name, x in tensors.items() if not name.endswith("exp_avg")}
    shapes = tensors | {"module.titles": torch.ones(2, 2)}
    for worse, state in [
        ({}, tensors),
        (about | {"record": {}}, tensors),
        (about | {"start": 3}, tensors),
        (about, {}),
        (about, fewer),
        (about, shapes),
        (about, tensors | {"random.cpu": torch.zeros(3, dtype=torch.uint8)}),
        (about, tensors | {"optimiser.first.step": torch.ones(())}),
    ]:
        write_checkpoint(tmp_path / "foreign", "training", worse, state)
        with pytest.raises(CheckpointError, match="holds no training that can go on"):
            run(checkpoint=tmp_path / "foreign")


def test_a_run_that_diverges_does_so_again(log: InteractionLog, tmp_path: Path) -> None:
    """Its last check is not kept: going on ends in the same error, and not in a result."""
    config = HSTUConfig(dimensions=8, n_layers=1, similarity="dot")  # under the cosine losses are bounded
    steps = replace(STEPS, learning_rate=3.0, warmup_steps=0)
    messages = []
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"pretraining diverged: its loss was .* at the start and") as caught:
            pretrain(log, config, steps, checkpoint=tmp_path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_training_without_a_checkpoint_writes_nothing(
    log: InteractionLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain(log, SMALL, STEPS)
    assert list(tmp_path.iterdir()) == []
