"""Members of the reward model: their formulas, and both forms against the naive way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsim_gr.backbones import HSTU, Backbone, HSTUConfig
from recsim_gr.backbones.base import Places
from recsim_gr.histories import Batch
from recsim_gr.prefixes import prefix_states
from recsim_gr.reward_heads import EMBEDDING_SCALE, FORMS, AppendedScorer, RewardMember, ScoreHead, Scorer

TITLES, D, L = 12, 8, 5


def random_backbone(seed: int = 0) -> Backbone:
    """Of a size where no title, position or gap counts for nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = HSTU(HSTUConfig(dimensions=D, n_layers=2, max_length=L), TITLES)
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return backbone.eval()


def random_member(form: str, seed: int = 0) -> RewardMember:
    member = FORMS[form](random_backbone(seed), 3.5).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for parameter in member.head.parameters():
            torch.nn.init.normal_(parameter)
    return member


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    """Histories of those lengths, padded to the longest."""
    rng, width = np.random.default_rng(seed), max(lengths)
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    titles = torch.from_numpy(np.stack([rng.permutation(TITLES)[:width] for _ in lengths]))
    scores = torch.from_numpy(rng.uniform(1, 5, titles.shape).astype(np.float32))
    times = torch.from_numpy(rng.exponential(20, titles.shape).astype(np.float32).cumsum(axis=1))
    return Batch(torch.arange(len(lengths)), titles.masked_fill(~valid, TITLES), scores * valid, times * valid, valid)


def appended_by_hand(member: AppendedScorer, batch: Batch, row: int, after: int, title: int) -> float:
    """m + w·h + b_a with h the last state of the sequence that really is the first events and then the title."""
    backbone, head = member.backbone, member.head
    titles, scores, times = (x[row : row + 1, :after] for x in (batch.titles, batch.scores, batch.times))
    token = backbone.title_vectors()[title] * D**0.5 + head.marker
    x = torch.cat([backbone._history(titles, scores), token[None, None]], dim=1)
    opening = times[:, :1] if after else torch.zeros(1, 1)
    last = times[:, -1:] if after else torch.zeros(1, 1)
    state = backbone._states(x, Places(torch.arange(after + 2), torch.cat([opening, times, last], dim=1)))[0, -1]
    return float(3.5 + head.weight @ state + head.title[title])


lengths = st.lists(st.integers(0, L), min_size=1, max_size=4).filter(any)


# -- shallow ----------------------------------------------------------------------------------------------------------


def test_a_shallow_score_is_the_formula_of_the_docstring() -> None:
    """r̂(x, a) = m + u·h + b_a + ⟨W h, ê_a⟩, with ê_a the title's embedding at length 5."""
    member, batch = random_member("shallow"), batch_of([3, 5])
    states = prefix_states(member.backbone, batch)
    assert isinstance(member.head, ScoreHead)
    got = member.head.all_titles(states, member.backbone)
    p = {name: value.double().numpy() for name, value in member.head.named_parameters()}
    h, titles = states[1, 2].double().numpy(), member.backbone.titles.double().numpy()
    for a in range(TITLES):
        direction = EMBEDDING_SCALE * titles[a] / np.linalg.norm(titles[a])
        expected = 3.5 + p["user"] @ h + p["title"][a] + (h @ p["mix"]) @ direction
        assert got[1, 2, a].item() == pytest.approx(expected, abs=1e-4)


def test_before_anything_is_learned_every_title_scores_about_the_mean() -> None:
    backbone, batch = random_backbone(), batch_of([3, 5])
    states = prefix_states(backbone, batch)
    scores = ScoreHead(D, TITLES, mean=2.25).all_titles(states, backbone)
    assert (scores - 2.25).abs().max() < 1.0
    assert scores.mean().item() == pytest.approx(2.25, abs=0.2)
    appended = AppendedScorer(backbone, 2.25).at(batch, batch.titles)
    assert (appended == 2.25).all()


# -- appended ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(lengths=lengths, seed=st.integers(0, 1_000))
def test_an_appended_score_is_that_of_the_appended_sequence(lengths: list[int], seed: int) -> None:
    member, batch = random_member("appended", seed), batch_of(lengths, seed)
    assert isinstance(member, AppendedScorer)
    titles = torch.from_numpy(np.random.default_rng(seed).integers(TITLES, size=batch.titles.shape))
    got, whole = member.at(batch, titles), member(batch.titles, batch.scores, batch.times)
    for row, length in enumerate(lengths):
        for t in range(length):
            expected = appended_by_hand(member, batch, row, t, int(titles[row, t]))
            assert got[row, t].item() == pytest.approx(expected, abs=1e-4)
        for a in (0, TITLES - 1, seed % TITLES):
            expected = appended_by_hand(member, batch, row, length, a)
            assert whole[row, a].item() == pytest.approx(expected, abs=1e-4)


def test_chunks_of_titles_and_of_users_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    member, batch = random_member("appended"), batch_of([0, 1, 3, 5, 2])
    history = batch.titles, batch.scores, batch.times
    whole = member(*history)
    monkeypatch.setattr("recsim_gr.reward_heads.CANDIDATES", 5)
    monkeypatch.setattr("recsim_gr.reward_heads.PASS_ENTRIES", 2 * (5 + 1 + 5) ** 2)
    seen: list[tuple[int, ...]] = []
    encode = member.backbone.encode_appended

    def noting(*arguments: Tensor) -> Tensor:
        seen.append(tuple(arguments[3].shape))
        return encode(*arguments)

    monkeypatch.setattr(member.backbone, "encode_appended", noting)
    torch.testing.assert_close(member(*history), whole, atol=1e-5, rtol=0)
    assert max(rows for rows, _ in seen) == 2
    assert max(titles for _, titles in seen) == 5


def test_the_candidates_score_is_not_read() -> None:
    """Nor anything that comes after: what is said at step t is the same whatever the events from t on."""
    member, batch = random_member("appended"), batch_of([5, 5])
    before = member.at(batch, batch.titles)
    later = batch._replace(scores=batch.scores.clone(), times=batch.times.clone())
    later.scores[:, 2:] = 1.0
    later.times[:, 2:] += 50.0
    after = member.at(later, batch.titles)
    torch.testing.assert_close(after[:, :3], before[:, :3], atol=1e-6, rtol=0)
    assert not torch.allclose(after[:, 3:], before[:, 3:], atol=1e-3)


def test_the_marker_is_learned() -> None:
    member, batch = random_member("appended").requires_grad_(True), batch_of([4, 3])
    member.at(batch, batch.titles).sum().backward()
    assert isinstance(member, AppendedScorer)
    for name, parameter in member.head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=lengths, seed=st.integers(0, 1_000))
def test_one_title_at_a_prefix_is_what_the_whole_catalogue_says_there(form: str, lengths: list[int], seed: int) -> None:
    member, batch = random_member(form, seed), batch_of(lengths, seed)
    titles = torch.from_numpy(np.random.default_rng(seed + 1).integers(TITLES, size=batch.titles.shape))
    got = member.at(batch, titles)
    for t in range(batch.titles.shape[1]):
        every = member(batch.titles[:, :t], batch.scores[:, :t], batch.times[:, :t])
        there = batch.valid[:, t]
        torch.testing.assert_close(got[there, t], every[there, titles[there, t]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_known_states_change_nothing(form: str) -> None:
    member, batch = random_member(form), batch_of([5, 2, 4])
    states = prefix_states(member.backbone, batch)
    own, given_states = member.at(batch, batch.titles), member.at(batch, batch.titles, states)
    assert torch.equal(own[batch.valid], given_states[batch.valid])


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form: str) -> None:
    member, batch = random_member(form), batch_of([3, 1])
    wider = [torch.nn.functional.pad(x, (0, 2), value=v) for x, v in zip(batch[1:4], (TITLES, 0.0, 0.0), strict=True)]
    torch.testing.assert_close(member(*wider), member(*batch[1:4]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_member_has_a_backbone_of_its_own_and_a_faster_head(form: str) -> None:
    backbone = random_backbone()
    member = FORMS[form](backbone, 3.0)
    with torch.no_grad():
        member.backbone.titles.zero_()
    assert backbone.titles.abs().max() > 0
    groups = member.groups(3.0)
    sizes = [len(group["params"]) for group in groups]  # type: ignore[arg-type]
    assert sum(sizes) == len(list(member.parameters()))
    assert [group.get("scale") for group in groups] == [None, 3.0]


def test_scorer_is_the_shallow_form() -> None:
    assert FORMS["shallow"] is Scorer
    assert list(FORMS) == ["shallow", "appended"]
