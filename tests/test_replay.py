"""Replayed worlds: loaders, splits, and a logging policy whose propensities can be checked by brute force."""

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsim_gr.behaviour import SPLITS
from recsim_gr.configs import config_id, from_dict, to_dict
from recsim_gr.errors import ConfigError, DataFileError
from recsim_gr.replay import KNOWN_FILES, RatingMatrix, ReplayConfig, ReplayWorld, load_matrix

REAL_DATA = Path(os.environ.get("RECSIM_GR_DATA") or Path(__file__).parents[2] / "shared" / "realdata")

Save = Callable[..., Path]


def real_file(name: str) -> Path:
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here; RECSIM_GR_DATA names the folder that has it: {KNOWN_FILES[name].source}")
    return path


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes an npz file and gives its path."""

    def save(name: str = "data.npz", **arrays: Any) -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return save


def made_up(n_users: int = 120, n_titles: int = 25, seed: int = 0) -> RatingMatrix:
    rng = np.random.default_rng(seed)
    ratings = 3 + rng.normal(size=n_titles) * 0.5 + rng.normal(size=(n_users, n_titles)) * 0.8
    return RatingMatrix(np.clip(ratings, 1, 5).astype(np.float32), name="made up")


def world_of(matrix: RatingMatrix, **fields: Any) -> ReplayWorld:
    return ReplayWorld(ReplayConfig(path="in memory", **({"history_length": 5} | fields)), matrix)


def packed(likes: np.ndarray) -> dict[str, Any]:
    """KuaiRec's keys for a 0/1 matrix."""
    n_users, n_titles = likes.shape
    return {
        "user_id": np.arange(n_users, dtype=np.int16),
        "video_id": np.arange(n_titles, dtype=np.int16),
        "shape": np.array(likes.shape, dtype=np.int64),
        "pos_packed": np.packbits(likes, axis=1),
    }


# -- loaders --------------------------------------------------------------------------------------------------


def test_jester_is_rescaled_linearly(save: Save) -> None:
    path = save(rating_x100=np.array([[-1000, 0, 1000], [250, -500, 125]], dtype=np.int16))
    matrix = load_matrix(path)
    np.testing.assert_allclose(matrix.satisfaction, np.array([[1, 3, 5], [3.5, 2, 3.25]]))
    assert matrix.satisfaction.dtype == np.float32
    assert (matrix.name, matrix.durations) == ("Jester", None)
    assert "does not know" in matrix.provenance


def test_kuairec_is_one_or_five(save: Save) -> None:
    likes = np.random.default_rng(0).integers(2, size=(7, 11)).astype(np.uint8)
    matrix = load_matrix(save(**packed(likes), w=np.zeros(3)))
    np.testing.assert_array_equal(matrix.satisfaction, 1 + 4 * likes)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.floats(-50, 50), st.floats(0.1, 50), st.integers(0, 99))
def test_own_ratings_keep_their_order_and_fill_the_scale(
    tmp_path_factory: pytest.TempPathFactory, n: int, m: int, low: float, width: float, seed: int
) -> None:
    ratings = low + width * np.random.default_rng(seed).random((n, m))
    path = tmp_path_factory.mktemp("own") / "own.npz"
    np.savez(path, ratings=ratings)
    satisfaction = load_matrix(path).satisfaction
    assert (satisfaction.min(), satisfaction.max()) == (1.0, 5.0)
    correlation = np.corrcoef(ratings.ravel(), satisfaction.ravel())[0, 1]
    assert correlation == pytest.approx(1.0, abs=1e-4)


def table(cells: list[tuple[int, int, float]]) -> str:
    """KuaiRec's own file: a row a (user, video, watch ratio); video v lasts v minutes."""
    rows = [f"{user},{video},1,{video * 60_000},2020-07-05,{ratio}" for user, video, ratio in cells]
    return "\n".join(["user_id,video_id,play_duration,video_duration,time,watch_ratio", *rows]) + "\n"


def test_kuairecs_own_table_is_continuous(tmp_path: Path) -> None:
    path = tmp_path / "small_matrix.csv"
    cells = [(user, video, 0.1 * user + 0.01 * video) for user in (3, 14, 30) for video in range(1, 41)]
    path.write_text(table(cells[::-1][1:]))  # one cell in 120 is missing: user 30, video 40
    matrix = load_matrix(path)
    assert matrix.name == "KuaiRec"
    np.testing.assert_array_equal(matrix.durations, np.arange(1.0, 41.0))
    np.testing.assert_allclose(matrix.satisfaction[0], 1 + 2 * (0.3 + 0.01 * np.arange(1, 41)), atol=1e-6)
    np.testing.assert_array_equal(matrix.satisfaction[2], [5.0] * 39 + [1.0])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (table([(1, 1, 0.5), (2, 2, 0.5)]), "has 50.0% of its .* cells"),
        (table([]), "has 0.0% of its"),
        (table([(1, 1, -0.5), (1, 2, 0.5)]), r"watch_ratio\[0\] must be a number of 0 or more"),
        (table([(1, 1, float("nan")), (1, 2, 0.5)]), r"watch_ratio\[0\] must be a number of 0 or more"),
        (table([(1, 0, 1.0), (1, 2, 0.5)]), r"durations\[0\] must be a positive"),
        (table([(1, 1, 0.5), (1, 2, 0.5)])[:-8], "is not KuaiRec's table"),
        (table([(1, 1, 0.5)]) + "x,2,3,4,5,6\n", "is not KuaiRec's table"),
    ],
)
def test_a_wrong_table_is_named_with_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    with pytest.raises(DataFileError, match=says):
        load_matrix(path)


def test_own_scale_and_durations(save: Save) -> None:
    path = save(ratings=np.array([[1, 2], [3, 2]]), low=0, high=4.0, duration_minutes=np.array([3, 90]))
    matrix = load_matrix(str(path))
    np.testing.assert_allclose(matrix.satisfaction, np.array([[2, 3], [4, 3]]))
    np.testing.assert_array_equal(matrix.durations, [3.0, 90.0])
    assert matrix.name == "data"
    world = world_of(made_up(n_titles=2), history_length=1)
    assert world.durations.shape == (2,)
    with_durations = dataclasses.replace(made_up(n_titles=2), durations=np.array([3.0, 90.0]))
    np.testing.assert_array_equal(world_of(with_durations, history_length=1).durations, [3.0, 90.0])


def test_a_matrix_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        made_up().satisfaction[0, 0] = 5


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"other": np.zeros(3)}, r"no format has its keys \(other\)"),
        ({}, r"no format has its keys \(none\)"),
        ({"rating_x100": np.zeros((2, 3))}, "key 'rating_x100' must have 2 dimensions"),
        ({"rating_x100": np.zeros(3, dtype=np.int16)}, "key 'rating_x100' must have 2 dimensions"),
        (
            {"rating_x100": np.array([[0, 9900]], dtype=np.int16)},
            r"rating_x100\[0, 1\] must be in −1000 to 1000",
        ),
        ({"rating_x100": np.zeros((4, 1), dtype=np.int16)}, r"2 titles or more, got \(4, 1\)"),
        ({"ratings": np.array([[1.0, np.nan], [2.0, 3.0]])}, r"ratings\[0, 1\] must be a finite number"),
        ({"ratings": np.array([[1.0, 2.0], [np.inf, 3.0]])}, r"ratings\[1, 0\] must be a finite number"),
        ({"ratings": np.ones((2, 2))}, "must have low below high, got 1 and 1"),
        ({"ratings": np.empty((0, 4))}, r"got \(0, 4\)"),
        ({"ratings": np.eye(2), "low": 0.5}, r"ratings\[0, 1\] must be in 0.5 to 1"),
        ({"ratings": np.eye(2), "high": np.nan}, "must have low below high"),
        ({"ratings": np.array([["a", "b"]])}, "key 'ratings' must have 2 dimensions and dtype kind"),
        ({"ratings": np.array([[None, 1]], dtype=object)}, "key 'ratings' cannot be read"),
        ({"ratings": np.eye(2), "duration_minutes": np.ones(3)}, "there must be 2 durations"),
        (
            {"ratings": np.eye(2), "duration_minutes": np.array([1.0, 0.0])},
            r"durations\[1\] must be a positive",
        ),
        (packed(np.eye(9, dtype=np.uint8)) | {"shape": np.array([9, 8])}, r"9 users and 9 videos need shape"),
        (
            packed(np.eye(9, dtype=np.uint8)) | {"pos_packed": np.zeros((9, 1), np.uint8)},
            "9 videos need shape",
        ),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(save: Save, arrays: dict[str, Any], says: str) -> None:
    path = save("wrong.npz", **arrays)
    with pytest.raises(DataFileError, match=says) as raised:
        load_matrix(path)
    assert "wrong" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_names_its_official_source(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"is missing; its official source is .*zenodo"):
        load_matrix(tmp_path / "kuairec_small.npz")
    with pytest.raises(DataFileError, match=r"is missing; its official source is .*Eigentaste"):
        load_matrix(tmp_path / "jester1_full7200.npz")
    with pytest.raises(DataFileError, match=r"mine.npz is missing; numpy.savez"):
        load_matrix(tmp_path / "mine.npz")
    with pytest.raises(DataFileError, match="cannot be read: Is a directory"):
        load_matrix(tmp_path)


def test_truncated_and_foreign_files(save: Save, tmp_path: Path) -> None:
    whole = save(ratings=np.random.default_rng(0).random((50, 20))).read_bytes()
    cut = tmp_path / "cut.npz"
    for length in (100, len(whole) // 2, len(whole) - 10):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataFileError, match=r"cut.npz is truncated"):
            load_matrix(cut)
    cut.write_bytes(whole[:3_000] + b"\0" * 50 + whole[3_050:])
    with pytest.raises(DataFileError, match="key 'ratings' cannot be read"):
        load_matrix(cut)
    for content in (b"", b"user,item\n1,2\n", pickle.dumps({"ratings": 1})):
        cut.write_bytes(content)
        with pytest.raises(DataFileError, match="is not an npz file"):
            load_matrix(cut)
    np.save(tmp_path / "one.npy", np.eye(3))
    with pytest.raises(DataFileError, match="not an npz file but a single array"):
        load_matrix(tmp_path / "one.npy")


# -- config ---------------------------------------------------------------------------------------------------


def test_identity_is_the_content_not_the_place(save: Save) -> None:
    ratings = made_up().satisfaction
    worlds = [
        ReplayWorld(ReplayConfig(path=str(save(name, ratings=ratings)), history_length=5))
        for name in ("here.npz", "there.npz")
    ]
    other = ReplayWorld(ReplayConfig(path=str(save("o.npz", ratings=ratings[::-1])), history_length=5))
    ids = [config_id(world.config) for world in (*worlds, other)]
    assert ids[0] == ids[1] != ids[2]
    again = from_dict(ReplayConfig, to_dict(worlds[0].config))
    assert again == worlds[0].config
    with pytest.raises(DataFileError, match="its config asks for"):
        ReplayWorld(dataclasses.replace(again, path=other.config.path))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": ""}, "path must be the path of an npz file"),
        ({"sha256": "12"}, "sha256 must be 64 hexadecimal digits"),
        ({"train_share": 0.0}, "train_share must be between 0 and 1"),
        ({"train_share": 0.9}, "the shares sum to 1.34"),
        ({"judge_share": float("nan")}, "judge_share must be a finite number"),
        ({"reward_noise": 2.0}, "reward_noise must be between 0 and 1"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ReplayConfig(**({"path": "x"} | fields))


def test_too_long_histories_and_too_few_users() -> None:
    with pytest.raises(ConfigError, match=r"history_length must be smaller than the catalogue \(25 titles\)"):
        world_of(made_up(), history_length=25)
    with pytest.raises(ConfigError, match="has 12 users, of which split 'validation' gets 1"):
        world_of(made_up(n_users=12))


# -- users ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 200), st.integers(0, 10_000))
def test_splits_are_disjoint_and_partners_stay_inside(n_users: int, seed: int) -> None:
    world = world_of(made_up(n_users=n_users), seed=seed)
    everyone = [world.users(split, world.n_users(split)) for split in SPLITS]
    together = np.concatenate(everyone)
    assert len(set(together.tolist())) == len(together) <= n_users
    assert len(together) >= n_users - len(SPLITS)
    for split, users in zip(SPLITS, everyone, strict=True):
        assert world.in_split(users, split).all()
        partners = world.partners(users)
        assert world.in_split(partners, split).all()
        assert (partners != users).all()


def test_every_partner_is_as_likely() -> None:
    users = np.arange(120)
    counts = np.zeros((120, 120))
    for seed in range(400):
        world = world_of(made_up(), seed=seed, train_share=0.5, validation_share=0.1)
        train = world.users("train", 60)
        counts[train, world.partners(train)] += 1
    drawn, n = counts.sum(axis=0), counts.sum()
    assert np.abs(drawn - n / 120).max() < 5 * np.sqrt(n / 120)
    assert counts[users, users].sum() == 0


def test_another_seed_is_another_split() -> None:
    first, second = (world_of(made_up(), seed=seed).users("train", 60) for seed in (0, 1))
    assert set(first.tolist()) != set(second.tolist())


def test_there_are_so_many_users_and_no_more() -> None:
    world = world_of(made_up())
    assert {split: world.n_users(split) for split in SPLITS} == {
        "train": 67,
        "validation": 14,
        "test": 24,
        "judge": 14,
    }
    for wrong in (lambda: world.users("train", 68), lambda: world.generate_log(68)):
        with pytest.raises(ConfigError, match="split 'train': made up has 67 there"):
            wrong()
    with pytest.raises(ConfigError, match="has 24 there"):
        world.contexts(25)
    with pytest.raises(ConfigError, match="no split 'holdout'"):
        world.users("holdout", 1)
    np.testing.assert_array_equal(world.users("train", 10, offset=5), world.users("train", 15)[5:])


def test_contexts_are_random_subsets_of_the_test_users() -> None:
    world = world_of(made_up())
    first, again, other = (world.contexts(20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.users, again.users)
    assert set(first.users.tolist()) != set(other.users.tolist())
    for contexts in (first, other):
        assert len(set(contexts.users.tolist())) == 20
        assert world.in_split(contexts.users, "test").all()
        assert (contexts.observations.epoch == world.config.n_epochs - 1).all()


def test_a_user_is_the_same_whoever_stands_beside() -> None:
    world = world_of(made_up())
    users = world.users("train", 40)
    whole, alone = world.draw_events(users, 5), world.draw_events(users[17:18], 5)
    np.testing.assert_array_equal(whole.titles[17], alone.titles[0])
    np.testing.assert_array_equal(whole.outcome.score[17], alone.outcome.score[0])


# -- truth and logging policy ---------------------------------------------------------------------------------


def test_satisfaction_is_the_matrix() -> None:
    matrix = made_up()
    users = np.array([5, 3, 119])
    np.testing.assert_array_equal(world_of(matrix).satisfaction(users), matrix.satisfaction[users])


def test_pull_mirrors_the_simulated_worlds() -> None:
    world = world_of(made_up(n_users=800, n_titles=60))
    users = world.users("train", 400)
    z, delta = world.standardised, world.behaviour(users).discernment
    np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=1), 1, atol=1e-5)
    expected = delta[:, None] * z[users] + np.sqrt(1 - delta[:, None] ** 2) * z[world.partners(users)]
    np.testing.assert_allclose(world.pull(users), expected, atol=1e-6)
    own = np.array([np.corrcoef(pull, z[u])[0, 1] for pull, u in zip(world.pull(users), users, strict=True)])
    assert np.corrcoef(own, delta)[0, 1] > 0.9


def test_a_user_who_likes_all_alike_is_pulled_by_nothing_of_their_own() -> None:
    satisfaction = made_up().satisfaction.copy()
    satisfaction[7] = np.float32(4.1)
    world = world_of(RatingMatrix(satisfaction))
    assert not world.standardised[7].any()
    assert np.isfinite(world.utilities(np.array([7]))).all()


@pytest.mark.parametrize("binary", [False, True])
def test_propensities_of_a_log_by_brute_force(binary: bool) -> None:
    matrix = made_up()
    if binary:
        matrix = RatingMatrix(np.where(matrix.satisfaction > 4, 5, 1).astype(np.float32))
    world = world_of(matrix, seed=4)
    log = world.generate_log(30, expose_propensities=True)
    propensities = log.require_propensities().reshape(30, 5)
    for row, user in enumerate(log.user[::5]):
        z = [_standardised(matrix.satisfaction[u]) for u in (user, world.partners(np.array([user]))[0])]
        epoch, delta, _ = (part[0] for part in world.behaviour(np.array([user])))
        utility = world.config.pull_strength * (delta * z[0] + np.sqrt(1 - delta**2) * z[1])
        weight = np.exp(utility + (1 - delta) * world.appeal[epoch])
        for step, title in enumerate(log.title[row * 5 : row * 5 + 5]):
            assert propensities[row, step] == pytest.approx(weight[title] / weight.sum(), rel=1e-5)
            weight[title] = 0.0


def _standardised(row: np.ndarray) -> np.ndarray:
    centred = row.astype(np.float64) - row.mean(dtype=np.float64)
    return centred / centred.std() if centred.std() > 0 else centred


def test_propensities_normalise_and_choices_follow_them() -> None:
    world = world_of(made_up(n_users=4_000))
    users = world.users("train", 2_000)
    first = np.exp(world.logging_log_probs(users, np.empty((2_000, 0), dtype=np.int64)))
    np.testing.assert_allclose(first.sum(axis=1), 1, atol=1e-9)
    chosen = np.bincount(world.draw_events(users, 1).titles[:, 0], minlength=25)
    error = chosen - first.sum(axis=0)
    assert (np.abs(error) < 4.5 * np.sqrt((first * (1 - first)).sum(axis=0))).all()


# -- real data ------------------------------------------------------------------------------------------------


def test_the_real_jester() -> None:
    path = real_file("jester1_full7200.npz")
    world = ReplayWorld(ReplayConfig(path=str(path)))
    assert world.matrix.provenance == "jester1_full7200.npz, byte for byte"
    assert world.matrix.satisfaction.shape == (7_200, 100)
    assert world.config.sha256 == KNOWN_FILES[path.name].sha256
    ratings = np.load(path)["rating_x100"] / 100
    assert ratings.mean() == pytest.approx(1.097, abs=1e-3)
    np.testing.assert_allclose(world.satisfaction(np.arange(9)), 1 + (ratings[:9] + 10) / 5, atol=1e-6)
    assert world.n_users("train") >= 4_000
    log = world.generate_log(500, expose_propensities=True)
    assert log.n_titles == 100
    assert 0 < world.reliability(300).within_user < 0.5
    assert world.alignment(300) > 0.1


def test_the_real_kuairec() -> None:
    world = ReplayWorld(ReplayConfig(path=str(real_file("kuairec_small.npz"))))
    assert world.matrix.provenance == "kuairec_small.npz, byte for byte"
    assert world.matrix.satisfaction.shape == (1_411, 3_327)
    assert int((world.matrix.satisfaction == 5).sum()) == 217_227
    log = world.generate_log(200)
    flat = log.score.reshape(200, -1).std(axis=1) == 0
    assert flat.mean() < 0.15
