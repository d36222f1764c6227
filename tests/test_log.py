"""The log: what is legal, what survives the disk, and that whatever else is on a disk is a named error."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recsim_gr.errors import LogFormatError, MissingPropensitiesError, RunDirectoryError
from recsim_gr.log import COLUMNS, SCHEMA_VERSION, InteractionLog

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)

Columns = dict[str, Any]


@st.composite
def legal(draw: st.DrawFn, min_users: int = 1, min_events: int = 1, exposed: bool | None = None) -> Columns:
    """The arguments of a legal log: ragged histories of users whose ids are in no order."""
    n_titles = draw(st.integers(max(5, min_events), 9))
    lengths = draw(st.lists(st.integers(min_events, 5), min_size=min_users, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = sum(lengths)
    duration = (1.0 + 100.0 * rng.random(n)).astype(np.float32)
    watched = rng.choice([0.0, 0.3, 1.0], size=n).astype(np.float32)
    with_propensities = draw(st.booleans()) if exposed is None else exposed
    return {
        "user": np.repeat(rng.permutation(1_000)[: len(lengths)], lengths),
        "epoch": np.repeat(rng.integers(0, 4, len(lengths)), lengths),
        "step": np.concatenate([np.arange(length) for length in lengths]),
        "hours": np.concatenate([1.0 + np.cumsum(rng.random(k)) for k in lengths]).astype(np.float32),
        "title": np.concatenate([rng.permutation(n_titles)[:length] for length in lengths]),
        "duration_minutes": duration,
        "watch_minutes": watched * duration,
        "score": 1.0 + 4.0 * watched,
        "n_titles": n_titles,
        "bounded_scores": draw(st.booleans()),
        "propensities": rng.choice([1e-300, 0.5, 1.0], size=n) if with_propensities else None,
        "provenance": draw(st.sampled_from([None, {"config": {"seed": 3, "noise": 0.5}, "name": "Größe"}])),
    }


def one_user(**changes: Any) -> Columns:
    """Three events of one user, by hand."""
    columns: Columns = {
        "user": np.array([7, 7, 7]),
        "epoch": np.array([1, 1, 1]),
        "step": np.array([0, 1, 2]),
        "hours": np.array([0.5, 2.0, 2.0], dtype=np.float32),
        "title": np.array([4, 0, 2]),
        "duration_minutes": np.array([40.0, 20.0, 90.0], dtype=np.float32),
        "watch_minutes": np.array([10.0, 20.0, 0.0], dtype=np.float32),
        "score": np.array([2.0, 5.0, 1.0], dtype=np.float32),
        "n_titles": 5,
        "propensities": np.array([0.25, 0.5, 1.0]),
        "provenance": {"world": "by hand"},
    }
    return columns | changes


def assert_same(one: InteractionLog, other: InteractionLog) -> None:
    for name in (*COLUMNS, "propensities"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
    for name in ("n_titles", "bounded_scores", "provenance"):
        assert getattr(one, name) == getattr(other, name), name


def refusal_of(columns: Columns) -> str:
    with pytest.raises(LogFormatError) as refusal:
        InteractionLog(**columns)
    message = str(refusal.value)
    assert "\n" not in message
    return message


# ----- what is legal


@PROPERTY
@given(legal())
def test_a_legal_log_is_accepted_with_its_types(columns: Columns) -> None:
    log = InteractionLog(**columns)
    assert len(log) == len(columns["user"])
    assert log.n_users == len(np.unique(columns["user"]))
    for name, kind in COLUMNS.items():
        assert getattr(log, name).dtype == kind, name
        np.testing.assert_array_equal(getattr(log, name), columns[name].astype(kind))


# Column, what would do according to the message, and values that do not. Each is put into a random row of a
# random legal log; the message must name that row.
ILLEGAL_CELLS: list[tuple[str, str, list[float]]] = [
    ("user", "a user id of 0 or more", [-1, -(2**40)]),
    ("epoch", "an epoch of 0 or more", [-1]),
    ("step", "0, 1, 2, … along the events of each user", [-1, 7, 100]),
    ("hours", "0 or more", [-0.5, -1e30]),
    ("hours", "a finite number", [np.nan, np.inf, -np.inf]),
    ("title", "in 0 to", [-1, 9, 2**40]),
    ("duration_minutes", "more than 0", [0.0, -1.0]),
    ("duration_minutes", "a finite number", [np.nan, np.inf]),
    ("watch_minutes", "between 0 and the duration", [-0.01, 102.0]),
    ("watch_minutes", "a finite number", [np.nan, -np.inf]),
    ("score", "between 1 and 5", [0.999, 0.0, 5.001, -3.0]),
    ("score", "a finite number", [np.nan, np.inf]),
    ("propensities", "in (0, 1]", [0.0, -0.1, 1.0 + 1e-9, np.nan, np.inf]),
]


@pytest.mark.parametrize(("name", "would_do", "values"), ILLEGAL_CELLS)
@PROPERTY
@given(columns=legal(exposed=True), data=st.data())
def test_one_illegal_cell_is_refused_by_column_row_and_value(
    name: str, would_do: str, values: list[float], columns: Columns, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, len(columns["user"]) - 1), label="row")
    value = data.draw(st.sampled_from(values), label="value")
    cells = columns[name].copy()
    cells[row] = value
    message = refusal_of(columns | {name: cells, "bounded_scores": True})
    assert message.startswith(f"row {row} of the log: {name} must be {would_do}")
    assert message.endswith(f", got {cells[row]}")


@PROPERTY
@given(legal(), st.floats(-1e6, 1e6, width=32))
def test_an_unbounded_score_may_be_any_finite_number(columns: Columns, score: float) -> None:
    columns["score"][-1] = score
    InteractionLog(**columns | {"bounded_scores": False})
    columns["score"][-1] = np.nan
    assert "score must be a finite number" in refusal_of(columns | {"bounded_scores": False})


@PROPERTY
@given(legal(min_events=2), st.data())
def test_a_title_seen_twice_is_refused_at_its_second_row(columns: Columns, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(np.flatnonzero(columns["step"] > 0).tolist()), label="row")
    earlier = data.draw(st.integers(1, int(columns["step"][row])), label="back")
    columns["title"][row] = columns["title"][row - earlier]
    message = refusal_of(columns)
    title = columns["title"][row]
    assert message == f"row {row} of the log: title must be a title that this user has not seen before, got {title}"


@PROPERTY
@given(legal(min_events=2), st.data())
def test_an_event_before_the_one_before_is_refused(columns: Columns, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(np.flatnonzero(columns["step"] > 0).tolist()), label="row")
    columns["hours"][row] = np.nextafter(columns["hours"][row - 1], np.float32(0.0))
    assert refusal_of(columns).startswith(f"row {row} of the log: hours must be no earlier than the event before")


@PROPERTY
@given(legal(min_events=2), st.data())
def test_a_user_in_two_epochs_is_refused_where_the_epoch_changes(columns: Columns, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(columns["user"]) - 1), label="row")
    columns["epoch"][row] += 1
    changed = row if columns["step"][row] > 0 else row + 1
    message = refusal_of(columns)
    assert message.startswith(f"row {changed} of the log: epoch must be the same for all events of a user")


@PROPERTY
@given(legal(min_users=3))
def test_a_user_in_two_places_is_refused(columns: Columns) -> None:
    starts = np.flatnonzero(columns["step"] == 0)
    first, last = columns["user"][0], columns["user"][-1]
    columns["user"][columns["user"] == last] = first
    message = refusal_of(columns)
    assert message == f"row 0 of the log: user must be a user whose events stand together, got {first}"
    # next to each other the two are one user whose steps begin again
    columns["user"][: starts[2]] = first
    assert refusal_of(columns).startswith(f"row {starts[1]} of the log: step must be 0, 1, 2, …")


@PROPERTY
@given(legal(min_events=2), st.data())
def test_a_foreign_user_in_a_history_is_refused(columns: Columns, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(columns["user"]) - 1), label="row")
    columns["user"][row] = 5_000  # no such user in `legal`
    broken = row if columns["step"][row] > 0 else row + 1
    assert refusal_of(columns).startswith(f"row {broken} of the log: step must be 0, 1, 2, …")


@PROPERTY
@given(legal(exposed=True), st.sampled_from([*COLUMNS, "propensities"]))
def test_columns_of_another_length_are_refused(columns: Columns, name: str) -> None:
    assert "the columns of a log must be equally long" in refusal_of(columns | {name: columns[name][:-1]})


@pytest.mark.parametrize("name", [*COLUMNS, "propensities"])
@pytest.mark.parametrize(
    "cells",
    [
        ["a", "b", "c"],
        [[1], [1], [1]],
        [None, 1, 1],
        [True, True, True],
        1.0,
        np.array(["2026-01-01"] * 3, "M8[D]"),
    ],
)
def test_columns_of_another_kind_are_refused(name: str, cells: Any) -> None:
    message = refusal_of(one_user(**{name: cells}))
    assert message.startswith(f"column {name!r} of a log must be a one-dimensional array of ")


@pytest.mark.parametrize("name", ["user", "epoch", "step", "title"])
def test_whole_numbers_are_not_taken_from_floats(name: str) -> None:
    message = refusal_of(one_user(**{name: one_user()[name].astype(np.float64)}))
    assert message == f"column {name!r} of a log must be a one-dimensional array of int64, got float64 of (3,)"


@pytest.mark.parametrize("n_titles", [0, -1, 4.0, "five", None])
def test_a_catalogue_is_a_positive_number_of_titles(n_titles: Any) -> None:
    assert refusal_of(one_user(n_titles=n_titles)).startswith("n_titles of a log must be a positive integer, got ")


def test_an_empty_log_is_legal() -> None:
    log = InteractionLog(**{name: np.empty(0, dtype=kind) for name, kind in COLUMNS.items()}, n_titles=3)  # type: ignore[arg-type]
    assert len(log) == log.n_users == 0
    assert log.sequences().titles.shape == (0, 0)


# ----- what it offers


@PROPERTY
@given(legal(exposed=True))
def test_a_log_cannot_be_changed(columns: Columns) -> None:
    log = InteractionLog(**columns)
    before = {name: getattr(log, name).copy() for name in (*COLUMNS, "propensities")}
    for name, kept in before.items():
        with pytest.raises(ValueError, match="read-only"):
            getattr(log, name)[0] = 0
        with pytest.raises(FrozenInstanceError):
            setattr(log, name, kept)
        columns[name][:] = 0  # what it was made of is not what it holds
        np.testing.assert_array_equal(getattr(log, name), kept)


@PROPERTY
@given(legal())
def test_sequences_are_the_rows_a_user_at_a_time(columns: Columns) -> None:
    log = InteractionLog(**columns)
    dense = log.sequences()
    users = list(dict.fromkeys(log.user.tolist()))  # in the order of the log
    assert len(dense) == len(users)
    assert dense.titles.shape[1] == max((log.user == user).sum() for user in users)
    for cells, kind in ((dense.titles, np.int64), (dense.scores, np.float32), (dense.times, np.float32)):
        assert cells.dtype == kind
    for row, user in enumerate(users):
        own = log.user == user
        n = int(dense.length[row])
        assert n == own.sum()
        for name, column, padding in (
            ("titles", log.title, log.n_titles),
            ("scores", log.score, 0),
            ("times", log.hours, 0),
        ):
            np.testing.assert_array_equal(getattr(dense, name)[row, :n], column[own])
            assert (getattr(dense, name)[row, n:] == padding).all()
        assert (log.epoch[own] == dense.epoch[row]).all()


def test_sequences_by_hand() -> None:
    # user 9 with titles 1, 0; user 3 with title 2; catalogue of 3, so padding is 3
    log = InteractionLog(
        user=np.array([9, 9, 3]),
        epoch=np.array([0, 0, 2]),
        step=np.array([0, 1, 0]),
        hours=np.array([1, 2, 5]),
        title=np.array([1, 0, 2]),
        duration_minutes=np.array([10, 10, 10]),
        watch_minutes=np.array([5, 10, 0]),
        score=np.array([3, 5, 1]),
        n_titles=3,
    )
    dense = log.sequences()
    assert dense.titles.tolist() == [[1, 0], [2, 3]]
    assert dense.scores.tolist() == [[3, 5], [1, 0]]
    assert dense.times.tolist() == [[1, 2], [5, 0]]
    assert dense.length.tolist() == [2, 1]
    assert dense.epoch.tolist() == [0, 2]


@PROPERTY
@given(legal(min_users=2), st.data())
def test_a_part_of_a_log_is_a_log_when_cut_between_users(columns: Columns, data: st.DataObject) -> None:
    log = InteractionLog(**columns)
    cut = data.draw(st.integers(1, len(log) - 1), label="cut")
    if log.step[cut] == 0:
        before, after = log.rows(slice(cut)), log.rows(slice(cut, None))
        for name in COLUMNS:
            joined = np.concatenate([getattr(before, name), getattr(after, name)])
            np.testing.assert_array_equal(joined, getattr(log, name))
        assert (before.propensities is None) == (log.propensities is None)
        assert before.n_users + after.n_users == log.n_users
    else:
        with pytest.raises(LogFormatError, match="row 0 of the log: step must be"):
            log.rows(slice(cut, None))


def test_propensities_are_there_only_when_exposed() -> None:
    assert InteractionLog(**one_user()).require_propensities().tolist() == [0.25, 0.5, 1.0]
    with pytest.raises(MissingPropensitiesError, match="expose_propensities=True"):
        InteractionLog(**one_user(propensities=None)).require_propensities()


# ----- the disk


@PROPERTY
@given(columns=legal())
def test_a_log_survives_the_disk(tmp_path_factory: pytest.TempPathFactory, columns: Columns) -> None:
    log, path = InteractionLog(**columns), tmp_path_factory.mktemp("log") / "deep" / "log.parquet"
    log.write(path)
    assert_same(InteractionLog.read(path), log)
    assert [file.name for file in path.parent.iterdir()] == ["log.parquet"]


def test_an_empty_log_survives_the_disk(tmp_path: Path) -> None:
    log = InteractionLog(**one_user(propensities=None)).rows(slice(0))
    log.write(str(tmp_path / "log.parquet"))
    assert_same(InteractionLog.read(str(tmp_path / "log.parquet")), log)


def test_the_file_holds_the_documented_columns_and_its_origin(tmp_path: Path) -> None:
    for propensities, extra in ((None, []), (one_user()["propensities"], ["propensity"])):
        InteractionLog(**one_user(propensities=propensities)).write(tmp_path / "log.parquet")
        schema = pq.read_schema(tmp_path / "log.parquet")
        assert schema.names == [*COLUMNS, *extra]
        assert json.loads(schema.metadata[b"recsim_gr"]) == {
            "schema_version": SCHEMA_VERSION,
            "n_titles": 5,
            "bounded_scores": True,
            "provenance": {"world": "by hand"},
            "catalogue": None,
        }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with a legal log of many rows."""
    n_users = 60
    columns = {name: np.tile(cells, n_users) for name, cells in one_user().items() if isinstance(cells, np.ndarray)}
    columns["user"] = np.repeat(np.arange(n_users), 3)
    InteractionLog(**one_user(**columns)).write(tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def refused(path: Path) -> str:
    """What reading says; one sentence that begins with the path, unless it is about a row."""
    with pytest.raises(LogFormatError) as refusal:
        InteractionLog.read(path)
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_a_truncated_file_is_refused(written: Path) -> None:
    whole = written.read_bytes()
    for length in [0, 1, 4, 8, *range(50, len(whole), 211), len(whole) - 8, len(whole) - 1]:
        written.write_bytes(whole[:length])
        message = refused(written)
        assert message.startswith(f"{written} cannot be read as a Parquet log (")
        assert message.endswith("); write it with InteractionLog.write")


def test_a_damaged_file_is_refused_or_unharmed(written: Path) -> None:
    # A flipped bit may hit a field that nobody reads; what may not happen is other data, or another error.
    # The catalogue's size and the provenance are in the footer, which Parquet protects by no checksum: they
    # are left out.
    log, whole = InteractionLog.read(written), written.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    rng = np.random.default_rng(0)
    n_refused = 0
    for position in rng.integers(0, len(whole) - footer, size=300):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        written.write_bytes(damaged)
        try:
            again = InteractionLog.read(written)
        except LogFormatError:
            n_refused += 1
        else:
            assert_same(again, log)
    assert n_refused > 200


def test_no_damage_to_the_footer_is_another_error(written: Path) -> None:
    whole = written.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    rng = np.random.default_rng(1)
    for position in rng.integers(len(whole) - footer, len(whole), size=600):
        damaged = bytearray(whole)
        damaged[position] = rng.integers(256)
        written.write_bytes(damaged)
        with suppress(LogFormatError):
            InteractionLog.read(written)


def test_what_is_no_file_or_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("user,epoch,step\n1,0,0\n" * 10)
    for path in (tmp_path / "missing.parquet", tmp_path / "text", tmp_path):
        assert refused(path).startswith(f"{path} cannot be read as a Parquet log (")


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def with_metadata(metadata: dict[bytes, bytes] | None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata(metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {b"pandas": b"{}"},
        {b"recsim_gr": b"not JSON"},
        {b"recsim_gr": b"\xff\xfe"},
        {b"recsim_gr": b"[1, 2]"},
        {b"recsim_gr": b"3"},
        {b"recsim_gr": b'"text"'},
        {b"recsim_gr": b"null"},
        {b"recsim_gr": b'{"n_titles": 5}'},
        {b"recsim_gr": b'{"schema_version": 2, "n_titles": 5}'},
    ],
)
def test_foreign_parquet_is_refused(written: Path, metadata: dict[bytes, bytes] | None) -> None:
    rewrite(written, with_metadata(metadata))
    assert refused(written).startswith(f"{written} is Parquet, but not a log of recsim_gr")


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_another_schema_version_is_refused(written: Path, version: object) -> None:
    about = {"schema_version": version, "n_titles": 5, "bounded_scores": True, "provenance": None}
    rewrite(written, with_metadata({b"recsim_gr": json.dumps(about).encode()}))
    message = refused(written)
    assert message == f"{written} has log schema version {version}; this version reads {SCHEMA_VERSION}"


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_a_doubled_and_an_empty_column_are_refused(written: Path, name: str) -> None:
    table = pq.read_table(written)
    rewrite(written, lambda table: table.drop_columns([name]))
    assert refused(written).startswith(f"{written} has no column {name!r}; a log has user, epoch, ")
    pq.write_table(table.append_column(name, table[name]), written)
    assert refused(written).startswith(f"{written} has column {name!r} twice")
    cells = table[name].to_pylist()
    cells[5] = None
    empty = table.set_column(table.column_names.index(name), name, pa.array(cells, type=table[name].type))
    pq.write_table(empty, written)
    assert refused(written).startswith(f"{written} has empty cells in column {name!r}")


@pytest.mark.parametrize("name", [*COLUMNS, "propensity"])
def test_a_column_of_another_type_is_refused(written: Path, name: str) -> None:
    def text(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))

    rewrite(written, text)
    assert refused(written).startswith("column ")


@pytest.mark.parametrize("row", [0, 7, 179])
def test_a_file_with_an_illegal_row_is_refused_by_row(written: Path, row: int) -> None:
    def wrong(table: pa.Table) -> pa.Table:
        scores = table["score"].to_numpy().copy()
        scores[row] = 5.5
        return table.set_column(table.column_names.index("score"), "score", pa.array(scores))

    rewrite(written, wrong)
    assert refused(written) == f"row {row} of the log: score must be between 1 and 5, got 5.5"


def test_narrower_columns_in_any_order_are_read(written: Path) -> None:
    # what another writer may make of the same log: int32 titles, float64 hours, its own order and extra
    # columns
    log = InteractionLog.read(written)

    def other(table: pa.Table) -> pa.Table:
        table = table.set_column(table.column_names.index("title"), "title", table["title"].cast(pa.int32()))
        table = table.set_column(table.column_names.index("hours"), "hours", table["hours"].cast(pa.float64()))
        return table.select(table.column_names[::-1]).append_column("comment", pa.array(["x"] * len(table)))

    rewrite(written, other)
    assert_same(InteractionLog.read(written), log)


@pytest.mark.parametrize("step", ["write_table", "fsync", "replace"])
@pytest.mark.parametrize("there_already", [False, True])
def test_a_full_disk_leaves_no_half_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, there_already: bool
) -> None:
    path, log = tmp_path / "log.parquet", InteractionLog(**one_user())
    if there_already:
        log.write(path)
    before = path.read_bytes() if there_already else None

    def full(table: Any, where: Any = None, *_: Any, **__: Any) -> None:
        if step == "write_table":
            Path(where).write_bytes(b"PAR1 half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"write_table": pq, "fsync": os, "replace": Path}[step]
    monkeypatch.setattr(target, step, full)
    with pytest.raises(RunDirectoryError) as refusal:
        InteractionLog(**one_user(user=np.array([8, 8, 8]))).write(path)
    monkeypatch.undo()
    assert str(refusal.value).startswith(f"cannot write {path}: No space left on device; ")
    assert [file.name for file in tmp_path.iterdir()] == (["log.parquet"] if there_already else [])
    if there_already:
        assert path.read_bytes() == before


def test_a_file_that_may_not_grow_is_a_full_disk_indeed(tmp_path: Path) -> None:
    # the same without a stand-in: the operating system refuses the 101st byte
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = InteractionLog(**one_user())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RunDirectoryError, match="cannot write"):
            log.write(tmp_path / "log.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@PROPERTY
@given(legal())
def test_a_row_of_the_first_illegal_cell_is_named(columns: Columns) -> None:
    assume(len(columns["user"]) > 1)
    columns["score"][1:] = 9.0
    assert refusal_of(columns | {"bounded_scores": True}).startswith("row 1 of the log: score must be")


def test_only_columns_that_nobody_can_write_to_are_not_copied() -> None:
    title = np.array([4, 0, 2])
    assert not np.shares_memory(InteractionLog(**one_user(title=title)).title, title)
    view = title[:]
    view.flags.writeable = False  # but the array under it can be written to
    assert not np.shares_memory(InteractionLog(**one_user(title=view)).title, title)
    title.flags.writeable = False
    assert InteractionLog(**one_user(title=title)).title is title
    short = title.astype(np.int32)
    short.flags.writeable = False
    assert InteractionLog(**one_user(title=short)).title.dtype == np.int64
