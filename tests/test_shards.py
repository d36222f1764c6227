"""Logs in shards: what is read is what was logged, and nothing is taken for whole that is not."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsim_gr import generation, shards
from recsim_gr.catalogue import Catalogue
from recsim_gr.errors import ConfigError, LogFormatError
from recsim_gr.generation import Plan, generate
from recsim_gr.log import COLUMNS, InteractionLog, ShardedLog
from recsim_gr.shards import Manifest, ShardDirectory, shard_name
from recsim_gr.world import World, WorldConfig

SMALL = WorldConfig(n_titles=30, history_length=4, seed=3)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def opened(directory: Path, verify: bool = True) -> ShardedLog:
    log = InteractionLog.open(directory, verify=verify)
    assert isinstance(log, ShardedLog)
    return log


def assert_same_log(one: InteractionLog, other: InteractionLog) -> None:
    """Bit for bit, types included."""
    for name in (*COLUMNS, "propensities"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
    for name in ("n_titles", "bounded_scores", "provenance"):
        assert getattr(one, name) == getattr(other, name)
    assert one.catalogue is not None
    assert other.catalogue is not None
    assert one.catalogue.to_json() == other.catalogue.to_json()


# -- the same log ---------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    n_titles = draw(st.sampled_from([2, 7, 255, 256, 257, 300]))
    length, epochs = draw(st.integers(1, min(6, n_titles - 1))), draw(st.integers(1, 3))
    world = WorldConfig(
        n_titles=n_titles,
        history_length=length,
        history_median=draw(st.sampled_from([0, (length + 1) // 2])),
        cold_share=draw(st.sampled_from([0.0, 0.3 if epochs > 1 and n_titles > 200 else 0.0])),
        n_epochs=epochs,
        reward_noise=draw(st.sampled_from([0.0, 0.4, 1.0])),
        noise_model=draw(st.sampled_from(["watch_time", "gaussian", "drift"])),
        seed=draw(st.integers(0, 3)),
    )
    return Plan(
        world=world,
        n_users=draw(st.integers(1, 60)),
        split=draw(st.sampled_from(["train", "test"])),
        propensities=draw(st.booleans()),
        users_per_shard=draw(st.sampled_from([1, 9, 25, 100])),
    )


@given(plan=plans(), part_events=st.sampled_from([1, 10, 40, 1_000]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_what_is_read_is_what_generate_log_makes(
    plan: Plan, part_events: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("log")
    expected = World(plan.world).generate_log(plan.n_users, plan.split, expose_propensities=plan.propensities)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PART_EVENTS", part_events)
        log = generate(plan, out)
    assert_same_log(log.read(), expected)
    assert (len(log), log.n_users, log.longest) == (len(expected), expected.n_users, int(expected.step.max()) + 1)
    assert (log.n_titles, log.bounded_scores) == (expected.n_titles, expected.bounded_scores)
    assert log.has_propensities == plan.propensities
    parts = list(log)
    assert [part.n_users for part in parts] == log.part_users
    assert np.concatenate([part.title for part in parts]).tobytes() == expected.title.tobytes()
    assert all(part.step[0] == 0 for part in parts)


def test_some_users_are_those_users(made: Path) -> None:
    log, whole = opened(made), opened(made).read()
    for start, stop in [(0, 50), (0, 1), (3, 27), (5, 10), (49, 50), (13, 23)]:
        some = log.users(start, stop)
        assert_same_log(some.read(), whole.rows(slice(4 * start, 4 * stop)))
        assert (some.n_users, len(some)) == (stop - start, 4 * (stop - start))
    assert_same_log(log.users(3, 27).users(4, 9).read(), whole.rows(slice(4 * 7, 4 * 12)))
    for start, stop in [(0, 51), (-1, 3), (5, 5)]:
        with pytest.raises(ConfigError, match="of a log of 50"):
            log.users(start, stop)


def test_a_file_is_opened_too(tmp_path: Path) -> None:
    log = World(SMALL).generate_log(7, expose_propensities=True)
    log.write(tmp_path / "log.parquet")
    again = InteractionLog.open(tmp_path / "log.parquet")
    assert isinstance(again, InteractionLog)
    assert_same_log(again, log)
    with pytest.raises(LogFormatError, match="nothing here"):
        InteractionLog.open(tmp_path / "nothing here")


def test_what_needs_the_whole_log_says_so(made: Path) -> None:
    log = opened(made)
    for name in ("title", "score", "propensities", "sequences", "rows"):
        with pytest.raises(ConfigError, match=rf"no '{name}' in memory; read\(\) it first"):
            getattr(log, name)
    assert not hasattr(log, "colour")


def test_columns_are_as_small_as_they_can_be(made: Path) -> None:
    schema = pq.read_schema(made / shard_name(0))
    assert str(schema.field("title").type) == "uint8"
    assert "duration_minutes" not in schema.names
    encodings = {}
    row_group = pq.ParquetFile(made / shard_name(0)).metadata.row_group(0)
    for index in range(row_group.num_columns):
        encodings[row_group.column(index).path_in_schema] = row_group.column(index).encodings
    assert "DELTA_BINARY_PACKED" in encodings["user"]
    assert "BYTE_STREAM_SPLIT" in encodings["score"]


def test_durations_that_are_not_their_titles_are_refused(tmp_path: Path) -> None:
    log = World(SMALL).generate_log(3)
    columns = {name: getattr(log, name) for name in COLUMNS}
    durations = World(SMALL).durations.astype(np.float32)
    shards.write_shard(tmp_path, 0, iter([columns]), durations)
    with pytest.raises(LogFormatError, match="not those of its titles"):
        shards.write_shard(tmp_path, 1, iter([{**columns, "duration_minutes": columns["watch_minutes"]}]), durations)
    assert not (tmp_path / shard_name(1)).exists()


# -- what is not to be trusted ----------------------------------------------------------------------------------------


def rewritten(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest and gives it the checksum of what it now says."""
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    change(values)
    path.write_text(json.dumps({**values, "sha256": shards._content_checksum(values)}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace('"n_users": 50', '"n_users": 51'), "does not have the checksum that it says"),
        (lambda text: text[: len(text) // 2], "cannot be read as a manifest"),
        (lambda text: '{"name": "webpack"}', "is not the manifest of a log in shards"),
        (lambda text: "[]", "is not the manifest of a log in shards"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "has schema version 2; this version"),
    ],
)
def test_manifests_that_were_changed(change: Callable[[str], str], says: str, made: Path) -> None:
    path = made / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(LogFormatError, match=rf"manifest\.json {says}"):
        InteractionLog.open(made)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["shards"].pop(), "do not add up"),
        (lambda m: m["shards"].pop(1), "are not shard-00000.parquet"),
        (lambda m: m["shards"].reverse(), "are not shard-00000.parquet"),
        (lambda m: m["shards"].clear(), "are not shard-00000.parquet"),
        (lambda m: m["shards"][0].update(file="../shard-00000.parquet"), "are not shard-00000.parquet"),
        (lambda m: m["catalogue"].update(file="/etc/passwd"), "its catalogue is not"),
        (lambda m: m["shards"][1].update(first_user=11), "leave users out"),
        (lambda m: m.update(users_per_shard=11), "not as many users as it says"),
        (lambda m: m.update(n_users=51), "users of its shards do not add up"),
        (lambda m: m.update(n_events=1), "events of its shards do not add up"),
        (lambda m: m.update(users_per_part=6), "not as many parts"),
        (lambda m: m.update(users_per_part=0), "not as many parts"),
        (lambda m: m.pop("n_titles"), "lacks something"),
        (lambda m: m["shards"][0].pop("parts"), "lacks something"),
        (lambda m: m.update(shards=7), "lacks something"),
        (lambda m: m.update(n_users="many"), "do not add up"),
    ],
)
def test_manifests_that_contradict_themselves(change: Callable[[dict[str, Any]], Any], says: str, made: Path) -> None:
    rewritten(made, change)
    with pytest.raises(LogFormatError, match=rf"manifest\.json .*{says}"):
        InteractionLog.open(made)


def test_directories_without_a_log(made: Path, tmp_path: Path) -> None:
    (made / "manifest.json").unlink()
    with pytest.raises(LogFormatError, match=r"manifest.json is missing; `recsim-gr generate`"):
        InteractionLog.open(made)
    with pytest.raises(LogFormatError, match="is one shard of a log; give "):
        InteractionLog.open(made / shard_name(0))


@pytest.mark.parametrize("name", ["shard-00001.parquet", "catalogue.parquet"])
def test_files_missing_or_cut_short_are_found_at_once(name: str, made: Path) -> None:
    whole = (made / name).read_bytes()
    (made / name).write_bytes(whole[:-1])
    with pytest.raises(LogFormatError, match=rf"{name} has {len(whole) - 1} bytes, its manifest says {len(whole)}"):
        InteractionLog.open(made)
    (made / name).unlink()
    with pytest.raises(LogFormatError, match=rf"{name} is missing"):
        InteractionLog.open(made)


def test_every_flipped_byte_is_found(made: Path) -> None:
    """By its checksum; and without it no flip is read as other events (some are harmless: unused statistics)."""
    path, whole = made / shard_name(1), opened(made).read()
    data, undetected = path.read_bytes(), 0
    for at in range(4, len(data), 53):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(LogFormatError, match=r"shard-00001\.parquet does not have the checksum"):
            list(opened(made))
        with suppress(LogFormatError):
            assert_same_log(opened(made, verify=False).read(), whole)
            undetected += 1
    assert undetected < len(range(4, len(data), 53)) / 2


def test_swapped_shards_are_found(made: Path) -> None:
    one, two = made / shard_name(0), made / shard_name(1)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)

    def swap_records(manifest: dict[str, Any]) -> None:
        records = manifest["shards"]
        for key in ("bytes", "sha256"):
            records[0][key], records[1][key] = records[1][key], records[0][key]

    with pytest.raises(LogFormatError, match=r"shard-0000[01]\.parquet (has|does not have)"):
        opened(made).read()
    rewritten(made, swap_records)
    with pytest.raises(LogFormatError, match=r"shard-00000\.parquet does not hold users 0 to 4 in part 0"):
        opened(made).read()


def test_a_shard_that_changes_after_it_was_verified(made: Path) -> None:
    log = opened(made)
    path = made / shard_name(0)
    assert log.part(0).n_users == 5
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(LogFormatError, match="does not have the checksum"):
        log.part(1)


def test_a_title_beyond_the_catalogue(made: Path) -> None:
    whole = ShardDirectory(made).catalogue
    small = Catalogue(whole.genre[:9], whole.duration_minutes[:9], whole.release[:9])
    record = shards.write_catalogue(made, small)

    def fewer_titles(manifest: dict[str, Any]) -> None:
        manifest.update(n_titles=9, catalogue=record._asdict())

    rewritten(made, fewer_titles)
    with pytest.raises(LogFormatError, match=r"shard-00000\.parquet holds title \d+; its log has 9"):
        opened(made).read()


def test_a_manifest_of_more_shards_is_small(made: Path) -> None:
    manifest = Manifest.read(made)
    assert sum(shard.users for shard in manifest.shards) == 50
    assert (made / "manifest.json").stat().st_size < 600 * (len(manifest.shards) + 3)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
