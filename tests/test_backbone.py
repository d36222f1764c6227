"""What padding and causality promise, on HSTU; its equations are in test_hstu.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.errors import ConfigError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)

N_TITLES, DIMENSIONS, MAX_LENGTH = 9, 6, 5


def make(n_layers: int = 2, positions: bool = True, seed: int = 0, **further: Any) -> HSTU:
    """A small backbone in eval mode, every parameter far from 0, so that a lost term shows."""
    shape = {"dimensions": DIMENSIONS, "n_heads": 2, "max_length": MAX_LENGTH} | further
    backbone = HSTU(HSTUConfig(n_layers=n_layers, positions=positions, **shape), N_TITLES)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=rng))
    return backbone.eval()


def histories(n: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """n full histories without repeats: titles, scores, times in hours with gaps from seconds to weeks."""
    rng = np.random.default_rng(seed)
    titles = np.stack([rng.permutation(N_TITLES)[:length] for _ in range(n)])
    gaps = np.exp(rng.uniform(-5, 6, size=(n, length)))
    scores = rng.uniform(1, 5, size=(n, length))
    return (
        torch.from_numpy(titles),
        torch.from_numpy(scores).float(),
        torch.from_numpy(gaps.cumsum(axis=1)).float(),
    )


# -- states and logits ---------------------------------------------------------------------------------------------


def test_logits_are_cosines_over_the_temperature() -> None:
    backbone = make(temperature=0.1)
    with torch.no_grad():
        states = backbone.encode(*histories(2, 3))
        logits = backbone.logits(states)
    np.testing.assert_allclose(np.linalg.norm(states.numpy(), axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(backbone.title_directions().detach(), axis=1), 10.0, atol=1e-5)
    title = backbone.titles[4].detach().double().numpy()
    cosine = states[1, 2].double().numpy() @ title / np.linalg.norm(title)
    assert logits.shape == (2, 4, N_TITLES)
    assert logits[1, 2, 4].item() == pytest.approx(10.0 * cosine, abs=1e-5)


# -- padding, causality, order ------------------------------------------------------------------------------------


@PROPERTY
@given(
    length=st.integers(0, MAX_LENGTH + 1),
    padding=st.integers(1, 5),
    junk=st.floats(-100, 100, width=32),
    seed=st.integers(0, 99),
)
def test_padding_changes_nothing_before_it(length: int, padding: int, junk: float, seed: int) -> None:
    backbone = make(seed=seed % 3)
    titles, scores, times = histories(2, length, seed)
    fill = torch.full((2, padding), junk)
    padded = (
        torch.cat([titles, torch.full((2, padding), N_TITLES)], dim=1),
        torch.cat([scores, fill], dim=1),
        torch.cat([times, fill.abs()], dim=1),
    )
    with torch.no_grad():
        bare, wide = backbone.encode(titles, scores, times), backbone.encode(*padded)
        torch.testing.assert_close(wide[:, : length + 1], bare, atol=1e-6, rtol=0)
        torch.testing.assert_close(backbone.encode_last(*padded), bare[:, -1], atol=1e-6, rtol=0)


@PROPERTY
@given(length=st.integers(1, MAX_LENGTH + 2), data=st.data(), seed=st.integers(0, 99))
def test_an_event_changes_no_state_before_it(length: int, data: st.DataObject, seed: int) -> None:
    """The state at position p has seen p events, so event t (from 0) shows from position t + 1 on."""
    backbone = make(seed=seed % 3)
    changed = data.draw(st.integers(0, length - 1))
    what = data.draw(st.sampled_from(["title", "score", "time"]))
    titles, scores, times = histories(1, length, seed)
    other = [titles.clone(), scores.clone(), times.clone()]
    if what == "title":
        other[0][0, changed] = next(i for i in range(N_TITLES) if i not in titles[0])
    elif what == "score":
        other[1][0, changed] = 6.0 - 0.5 * scores[0, changed]
    else:
        other[2][0, changed:] += 700.0
    with torch.no_grad():
        one, two = backbone.encode(titles, scores, times)[0], backbone.encode(*other)[0]
    torch.testing.assert_close(one[: changed + 1], two[: changed + 1], atol=1e-6, rtol=0)
    # the first event's time is the opening token's too: moving all events together is no change
    if (what, changed) != ("time", 0):
        assert (one[changed + 1] - two[changed + 1]).abs().max() > 1e-4


def test_gradients_run_backward_in_time_only() -> None:
    backbone = make()
    titles, scores, times = histories(1, 4)
    scores.requires_grad_(True)
    weight = torch.arange(1.0, DIMENSIONS + 1)
    for position in range(5):
        (gradient,) = torch.autograd.grad(backbone.encode(titles, scores, times)[0, position] @ weight, scores)
        assert (gradient[0, :position] != 0).all()
        assert not gradient[0, position:].any()


def test_encode_last_finds_the_end_of_each_history() -> None:
    backbone = make()
    titles, scores, times = histories(4, 4)
    lengths = [0, 4, 1, 3]
    for row, length in enumerate(lengths):
        titles[row, length:], scores[row, length:], times[row, length:] = N_TITLES, 0.0, 0.0
    with torch.no_grad():
        last, all_states = backbone.encode_last(titles, scores, times), backbone.encode(titles, scores, times)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(last[row], all_states[row, length])


def test_positions_beyond_the_longest_share_the_last_ones_parameters() -> None:
    backbone = make()
    batch = histories(1, MAX_LENGTH + 3)
    with torch.no_grad():
        before = backbone.encode(*batch)
        assert torch.isfinite(before).all()
        backbone.position[MAX_LENGTH - 1] += 1.0
        after = backbone.encode(*batch)
    moved = (after - before).abs().amax(dim=(0, 2)) > 1e-4
    assert moved.tolist() == [False] * (MAX_LENGTH - 1) + [True] * 5  # of MAX_LENGTH + 4 positions


def test_dropout_acts_in_training_only() -> None:
    backbone, batch = make(), histories(2, 4)
    with torch.no_grad():
        assert torch.equal(backbone.encode(*batch), backbone.encode(*batch))
        backbone.train()
        assert not torch.equal(backbone.encode(*batch), backbone.encode(*batch))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dimensions", 0),
        ("dimensions", 2.5),
        ("n_layers", 0),
        ("n_heads", 0),
        ("n_heads", 3),  # does not divide 32
        ("max_length", -1),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.inf),
    ],
)
def test_a_bad_shape_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"HSTUConfig\.{field} must be .*{value}"):
        HSTUConfig(**{field: value})


def test_a_backbone_needs_its_longest_history() -> None:
    with pytest.raises(ConfigError, match="max_length"):
        HSTU(HSTUConfig(), N_TITLES)
