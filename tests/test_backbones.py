"""One contract over every registered backbone: what may be read, padding, candidates, shapes; and a user's own."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recsim_gr.agents import agent_type
from recsim_gr.agents.base import load_agent
from recsim_gr.backbones import (
    BACKBONES,
    Backbone,
    BackboneConfig,
    Places,
    SetEncoderConfig,
    TitleMetadata,
    backbone_type,
    build_backbone,
    new_backbone,
    register_backbone,
)
from recsim_gr.errors import ConfigError, UnknownNameError
from recsim_gr.log import InteractionLog
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)
N_TITLES, DIMENSIONS, MAX_LENGTH = 9, 8, 5
SHORT = TrainingConfig(steps=6, batch_users=16, warmup_steps=2, checks=1)

kinds = pytest.mark.parametrize("kind", sorted(BACKBONES))


def make(kind: str, seed: int = 0, **options: Any) -> Backbone:
    """A small backbone in eval mode, every parameter far from 0, so that a lost term shows."""
    config_type = backbone_type(kind).config_type
    config = config_type(**({"dimensions": DIMENSIONS, "max_length": MAX_LENGTH} | options))
    backbone = new_backbone(config, N_TITLES)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng))
    return backbone.eval()


def histories(n: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    titles = np.stack([rng.permutation(N_TITLES)[:length] for _ in range(n)]).reshape(n, length)
    scores, gaps = rng.uniform(1, 5, (n, length)), rng.exponential(3.0, (n, length))
    return (
        torch.from_numpy(titles),
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(gaps.cumsum(axis=1).astype(np.float32)),
    )


@kinds
@pytest.mark.parametrize("length", [0, 1, MAX_LENGTH, MAX_LENGTH + 3])
def test_a_state_after_every_prefix(kind: str, length: int) -> None:
    backbone = make(kind)
    with torch.no_grad():
        states = backbone.encode(*histories(3, length))
        last = backbone.encode_last(*histories(3, length))
    assert states.shape == (3, length + 1, DIMENSIONS)
    assert states.dtype == torch.float32
    assert torch.isfinite(states).all()
    torch.testing.assert_close(last, states[:, -1])
    if backbone.config.similarity == "cosine":
        torch.testing.assert_close(states.norm(dim=-1), torch.ones(3, length + 1))


@kinds
@PROPERTY
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_the_last_state_alone_is_that_of_all_states(kind: str, lengths: list[int], seed: int) -> None:
    """Wherever each history ends; in gradients too."""
    backbone = make(kind, seed)
    titles, scores, times = histories(len(lengths), 7, seed)
    ends = torch.tensor(lengths)
    titles = titles.masked_fill(torch.arange(7) >= ends[:, None], N_TITLES)
    found = backbone.encode_last(titles, scores, times)
    expected = backbone.encode(titles, scores, times)[torch.arange(len(lengths)), ends]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
    parameters = list(backbone.parameters())
    for one, two in zip(
        torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        one, two = (torch.zeros(1) if gradient is None else gradient for gradient in (one, two))
        assert float((one - two).abs().max()) <= 1e-5 * (1.0 + float(two.abs().max()))


@kinds
def test_what_comes_later_changes_nothing_before(kind: str) -> None:
    backbone = make(kind)
    titles, scores, times = histories(2, 6)
    other = (titles.clone(), scores.clone(), times.clone())
    other[0][:, 3] = titles[:, 5]
    other[0][:, 5] = titles[:, 3]
    other[1][:, 3:] = 1.5
    other[2][:, 3:] += 7.0
    with torch.no_grad():
        before, after = backbone.encode(titles, scores, times), backbone.encode(*other)
    torch.testing.assert_close(after[:, :4], before[:, :4], atol=1e-6, rtol=0)
    assert (after[:, 4:] - before[:, 4:]).abs().amax(dim=(1, 2)).min() > 1e-3


@kinds
@PROPERTY
@given(
    length=st.integers(0, 7),
    padding=st.integers(1, 9),
    seed=st.integers(0, 999),
    rubbish=st.floats(-1e3, 1e3) | st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_padding_never_leaks(kind: str, length: int, padding: int, seed: int, rubbish: float) -> None:
    """How far a batch is padded, with which scores and times, and who else is in it: neither states nor gradients."""
    backbone = make(kind, seed)
    alone = histories(1, length, seed)
    longest = length + padding
    company = histories(2, min(longest, N_TITLES), seed + 1)
    fill = (N_TITLES, rubbish, abs(rubbish))

    def padded(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=value)

    together = [
        torch.cat([padded(own, value), padded(other, value)])
        for own, other, value in zip(alone, company, fill, strict=True)
    ]
    found, expected = backbone.encode(*together)[:1, : length + 1], backbone.encode(*alone)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
    parameters = list(backbone.parameters())
    for one, two in zip(
        torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        if one is None or two is None:
            assert one is None or not one.any()
            assert two is None or not two.any()
        else:
            torch.testing.assert_close(one, two, atol=1e-5 * (1.0 + float(two.abs().max())), rtol=1e-4)
    last = backbone.encode_last(*together)
    torch.testing.assert_close(last[:1], expected[:, -1], atol=2e-6, rtol=1e-6)


@kinds
def test_a_candidate_reads_its_prefix_and_itself(kind: str) -> None:
    """All candidates at once are what each is alone, behind a history that is really cut there."""
    backbone = make(kind)
    titles, scores, times = histories(2, 6)
    candidates = torch.tensor([[8, 0, 3, 3], [1, 2, 5, 7]])
    after = torch.tensor([[6, 0, 2, 5], [1, 6, 3, 0]])
    marker = torch.linspace(-1.0, 1.0, DIMENSIONS)
    with torch.no_grad():
        found = backbone.encode_appended(titles, scores, times, candidates, after, marker)
        for b in range(2):
            for c in range(4):
                n = int(after[b, c])
                cut = [x[b : b + 1, :n] for x in (titles, scores, times)]
                # one more event: the candidate, whose token is its embedding and the marker, at the last event's time
                x = torch.cat(
                    [backbone._history(*cut[:2]), backbone._embedded(candidates[b, c].view(1, 1)) + marker], 1
                )
                hours = torch.cat([cut[2][:, :1].sum(1, True), cut[2]], dim=1)
                hours = torch.cat([hours, hours[:, -1:]], dim=1)
                alone = backbone._states(x, Places(torch.arange(n + 2), hours))[0, -1]
                torch.testing.assert_close(found[b, c], alone, atol=1e-5, rtol=1e-5)


@kinds
def test_options_that_all_have(kind: str) -> None:
    blind = make(kind, positions=False)
    assert not hasattr(blind, "position")
    titles, scores, times = histories(2, 4)
    deaf = make(kind, scores=False)
    with torch.no_grad():
        torch.testing.assert_close(deaf.encode(titles, scores, times), deaf.encode(titles, 6.0 - scores, times))
        heard = make(kind)
        assert not torch.allclose(heard.encode(titles, scores, times), heard.encode(titles, 6.0 - scores, times))
    for similarity in ("dot", "cosine"):
        backbone = make(kind, similarity=similarity)
        states = backbone.encode(titles, scores, times)
        torch.testing.assert_close(backbone.logits(states), states @ backbone.title_directions().T)


@kinds
def test_a_shape_builds_the_same_backbone(kind: str) -> None:
    backbone = make(kind)
    again = build_backbone(backbone.shape())
    again.load_state_dict(backbone.state_dict())
    assert again.config == backbone.config
    batch = histories(2, 4)
    with torch.no_grad():
        assert torch.equal(again.eval().encode(*batch), backbone.encode(*batch))


@kinds
def test_an_untrained_backbone_is_close_to_uniform_where_products_are_plain(kind: str) -> None:
    torch.manual_seed(0)
    config = backbone_type(kind).config_type(dimensions=32, max_length=20, similarity="dot")
    backbone = new_backbone(config, 200).eval()
    titles = torch.stack([torch.randperm(200)[:20] for _ in range(32)])
    with torch.no_grad():
        logits = backbone.logits(backbone.encode(titles, torch.full(titles.shape, 3.0), torch.zeros(titles.shape)))
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), titles.flatten())
    assert float(nll) == pytest.approx(math.log(200), abs=0.3)


@kinds
def test_every_option_says_why_it_is_what_it_is(kind: str) -> None:
    import inspect

    config_type = backbone_type(kind).config_type
    source = "".join(inspect.getsource(base) for base in config_type.__mro__[:-1] if base is not object)
    for option in fields(config_type):
        line = source.index(f"    {option.name}: ")
        assert source[line:].split("\n", 2)[1].strip().startswith('"""'), option.name


def test_a_set_has_no_order_and_no_time() -> None:
    backbone = make("set")
    titles, scores, times = histories(3, 6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    with torch.no_grad():
        one = backbone.encode_last(titles, scores, times)
        other = backbone.encode_last(titles[:, order], scores[:, order], 100.0 - times)
        fewer = backbone.encode_last(titles[:, :5], scores[:, :5], times[:, :5])
    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(one, fewer, atol=1e-3)
    with pytest.raises(ConfigError, match=r"positions must be False"):
        SetEncoderConfig(positions=True)


def test_unknown_backbones_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="hstu"):
        backbone_type("gru4rec")
    with pytest.raises(UnknownNameError, match="HSTUConfig"):
        new_backbone(BackboneConfig(max_length=3), N_TITLES)


# -- learning on them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return World(WorldConfig(n_titles=30, history_length=8, seed=1000)).generate_log(80)


@kinds
def test_agents_learn_on_it(kind: str, log: InteractionLog) -> None:
    config = replace(backbone_type(kind).config_type(), dimensions=8)
    backbone = pretrain(log, config, SHORT)
    assert backbone.config.max_length == 8
    rewards = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=SHORT))
    observations = log.sequences()[:5]
    for name in ("BC", "ASFT", "CQL"):
        agent = agent_type(name)(training=SHORT).fit(log, backbone, rewards)
        probabilities = np.exp(agent.log_probs(observations))
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
        assert not probabilities[observations.seen()].any()


@dataclass(frozen=True)
class GRUConfig(BackboneConfig):
    """GRU4Rec's cell (Hidasi et al. 2016), as a user might add it."""


class GRU(Backbone):
    """A gated recurrent unit over the tokens."""

    name = "gru"
    config_type = GRUConfig

    def __init__(self, config: Any, n_titles: int, metadata: TitleMetadata | None = None) -> None:
        super().__init__(config, n_titles, metadata)
        self.cell = nn.GRU(config.dimensions, config.dimensions, batch_first=True)

    def mix(self, x: Tensor, places: Places) -> Tensor:
        if places.allowed is not None:
            raise NotImplementedError("a recurrent state cannot leave tokens out")
        states: Tensor = self.cell(x)[0]
        return states


@pytest.fixture
def gru() -> Iterator[type[Backbone]]:
    yield register_backbone(GRU)
    del BACKBONES["gru"]


def test_a_user_adds_one_with_one_file(gru: type[Backbone], log: InteractionLog, tmp_path: Path) -> None:
    backbone = pretrain(log, GRUConfig(dimensions=8), SHORT)
    assert isinstance(backbone, gru)
    agent = agent_type("BC")(training=SHORT).fit(log, backbone)
    agent.save(tmp_path)
    observations = log.sequences()[:5]
    np.testing.assert_array_equal(load_agent(tmp_path).log_probs(observations), agent.log_probs(observations))

    class Other(GRU):
        pass

    with pytest.raises(ConfigError, match="already a backbone 'gru'"):
        register_backbone(Other)
