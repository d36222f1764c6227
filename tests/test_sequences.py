"""Real sequences from text files: what is read, in which order, and what is refused."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsim_gr.errors import ConfigError, DataFileError
from recsim_gr.sequences import NEUTRAL_SCORE, Sequences, read_sequences

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"

Event = tuple[str, str, float, int]


def written(path: Path, events: list[Event], atomic: bool = True) -> Path:
    """A file of events."""
    if atomic:
        path.write_text(INTER + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in events), encoding="utf-8")
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["timestamp", "userId", "genre", "movieId", "rating"])
        out.writerows([t, u, "a, b", i, r] for u, i, r, t in events)
    return path


def histories(found: Sequences) -> dict[str, list[tuple[str, float, float]]]:
    """By the file's names: (title, score, hours) of every user."""
    names, users = found.title_names.to_pylist(), found.user_names.to_pylist()
    return {
        user: [
            (names[found.titles[e]], float(found.scores[e]), float(found.hours[e]))
            for e in range(found.starts[u], found.starts[u + 1])
        ]
        for u, user in enumerate(users)
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["7", "ä", "u 1", 'q"']),
            st.sampled_from(["x", "1", "01", "z,z"]),
            st.sampled_from([1.0, 2.5, 5.0]),
            st.integers(0, 5).map(lambda t: 881_250_949 + 1800 * t),
        ),
        min_size=1,
        unique_by=lambda event: event[:2],
    ),
    st.booleans(),
)
def test_what_is_read_equals_plain_python(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], atomic: bool
) -> None:
    path = written(tmp_path_factory.mktemp("data") / ("events.inter" if atomic else "events.csv"), events, atomic)
    found = read_sequences(path)
    expected: dict[str, list[tuple[str, float, float]]] = {}
    for user in dict.fromkeys(user for user, *_ in events):
        own = sorted((event for event in events if event[0] == user), key=lambda event: event[3])  # stable
        expected[user] = [(title, score, (t - own[0][3]) / 3600) for _, title, score, t in own]
    read = histories(found)
    assert list(read) == list(expected)
    for user, wanted in expected.items():
        assert [event[:2] for event in read[user]] == [event[:2] for event in wanted]
        assert [event[2] for event in read[user]] == pytest.approx([event[2] for event in wanted], abs=1e-6)
    assert found.title_names.to_pylist() == list(dict.fromkeys(title for _, title, *_ in events))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_windows_are_the_last_events_with_times_of_their_own(tmp_path: Path) -> None:
    events: list[Event] = [*(("u", f"t{k}", 3.0, 10**9 + 7200 * k) for k in range(5)), ("v", "t0", 4.0, 5)]
    found = read_sequences(written(tmp_path / "e.inter", events))
    last = found.observations(3)
    assert last.titles.tolist() == [[2, 3, 4], [0, 5, 5]]  # five titles: 5 is the padding
    assert last.times.tolist() == [[0, 2, 4], [0, 0, 0]]
    assert last.length.tolist() == [3, 1]
    assert last.times.dtype == np.float32
    whole = found.observations()
    assert whole.titles.shape == (2, 5)
    with pytest.raises(ConfigError, match="max_length"):
        found.observations(-1)


def test_minutes_survive_years(tmp_path: Path) -> None:
    events: list[Event] = [("u", "a", 3, 0), ("u", "b", 3, 20 * 365 * 86400), ("u", "c", 3, 20 * 365 * 86400 + 60)]
    last = read_sequences(written(tmp_path / "e.inter", events)).observations(2)
    assert last.times[0, 1] * 60 == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("ratings", "scores"),
    [([1, 5, 2.5], [1, 5, 2.5]), ([0.5, 5, 2.75], [1, 5, 3]), ([-10, 10, 0], [1, 5, 3]), ([7, 7, 7], [1, 1, 1])],
)
def test_ratings_become_scores(ratings: list[float], scores: list[float], tmp_path: Path) -> None:
    events: list[Event] = [("u", f"t{k}", rating, k) for k, rating in enumerate(ratings)]
    assert read_sequences(written(tmp_path / "e.inter", events)).scores.tolist() == pytest.approx(scores)


def test_without_ratings_and_with_other_units(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text("\ufeffuser,item,time\r\na,x,7200000\r\n\r\na,y,3600000\r\n", encoding="utf-8")
    found = read_sequences(path, time_unit="milliseconds")
    assert not found.has_ratings
    assert histories(found) == {"a": [("y", NEUTRAL_SCORE, 0.0), ("x", NEUTRAL_SCORE, 1.0)]}


def test_repeats(tmp_path: Path) -> None:
    events: list[Event] = [("a", "y", 1, 9), ("b", "y", 1, 1), ("a", "y", 5, 3), ("a", "x", 2, 4), ("a", "y", 3, 3)]
    path = written(tmp_path / "e.inter", events)
    with pytest.raises(DataFileError, match=r'e\.inter line 2 has a user and a title.*repeats="first"'):
        read_sequences(path)
    found = read_sequences(path, repeats="first")  # the first in time; of two at 3 o'clock, that of line 4
    assert [title for title, *_ in histories(found)["a"]] == ["y", "x"]
    assert [score for _, score, _ in histories(found)["a"]] == [5.0, 2.0]
    assert found.left_out == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"user,title,timestamp\n", "has a header and no events"),
        (b"user,title\na,x\n", "line 1: no column for the timestamp"),
        (b"1,2,3\n4,5,6\n", "line 1: no column for the user"),
        (b"user\ttitle\ttimestamp\na\tx\t1\n", "with commas between"),
        (b"user,user,title,timestamp\na,a,x,1\n", "named twice"),
        (b"user,title,timestamp\na,x,1\n\na,y,soon\n", "line 4 has 'soon' as its timestamp"),
        (b"user,title,timestamp,rating\na,x,1,3\nb,x,1,good\n", "line 3 has 'good' as its rating"),
        (b"user,title,timestamp\na,x,1\na,y\n", "line 3 has 2 fields where the header has 3"),
        (b"user,title,timestamp\na,x,1\na,y,\n", "line 3 has no number as its timestamp"),
        (b"user,title,timestamp\na,x,1\na,y,nan\n", "line 3 has no number as its timestamp"),
        (b"user,title,timestamp\na,x,1\n\na,y,inf\n", "line 4 has no number as its timestamp"),
        (b"user,title,timestamp\na,x,1\n,y,2\n", "line 3 has no user"),
        (b"user,title,timestamp\na,x,1\nb,,2\n", "line 3 has no title"),
        (b"user,title,timestamp\na,x,1\nb,\xe9\xe8,2\n", "no text in UTF-8"),
        ("user,title,timestamp\na,x,1\n".encode("utf-16"), "no text in UTF-8"),
        (b"PK\x03\x04\x00\x00\x00", "no text in UTF-8"),
        (b"\xff\xfe\xe9,title,timestamp\na,x,1\n", "no text in UTF-8"),
    ],
)
def test_bad_files(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_bytes(content)
    with pytest.raises(DataFileError) as raised:
        read_sequences(path)
    assert says in str(raised.value)
    assert "events.csv" in str(raised.value)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="No such file"):
        read_sequences(tmp_path / "none.inter")
    with pytest.raises(DataFileError, match="cannot be read"):
        read_sequences(tmp_path)
    path = written(tmp_path / "e.inter", [("a", "x", 1, 1)])
    with pytest.raises(ConfigError, match="repeats must be one of"):
        read_sequences(path, repeats="last")
    with pytest.raises(ConfigError, match="time_unit must be one of"):
        read_sequences(path, time_unit="fortnights")


def test_names_are_kept_as_text(tmp_path: Path) -> None:
    found = read_sequences(written(tmp_path / "e.inter", [("01", "1", 1, 1), ("1", "01", 1, 1)]))
    assert found.user_names.to_pylist() == ["01", "1"]
    assert found.title_names.to_pylist() == ["1", "01"]
