"""The fast attention, dropout and layer norm against their plain versions, and their gradients against differences."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsim_gr.backbones.attention import CLOSED, NORMALISERS, AttentionKind, Block, attention, plain_attention
from recsim_gr.backbones.elementwise import dropout, layer_norm

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

ENTRIES = 7
"""Of the table, the last two closed."""

KINDS = st.builds(
    AttentionKind,
    heads=st.sampled_from([1, 2, 3]),
    activated=st.booleans(),
    normaliser=st.sampled_from(NORMALISERS),
    length=st.integers(1, 9),
    scale=st.sampled_from([1.0, 0.4]),
)


def case(seed: int, b: int, t: int, cuts: list[int], shared: bool) -> tuple[Tensor, Tensor, list[Block]]:
    """P, a table, and blocks of random entries that end at ``cuts``: open on the diagonal, causal if there are cuts."""
    rng = torch.Generator().manual_seed(seed)
    projected = torch.randn(b, t, 24, generator=rng, dtype=torch.float64)
    table = torch.randn(ENTRIES, generator=rng, dtype=torch.float64)
    table[-2:] = CLOSED
    entries = torch.randint(0, ENTRIES, (1 if shared else b, t, t), generator=rng)
    entries[:, range(t), range(t)] = 0
    if cuts:
        entries[:, torch.ones(t, t).triu(1).bool()] = ENTRIES - 1
    blocks, start = [], 0
    for stop in [*cuts, t]:
        blocks.append(Block(start, stop, entries[:, start:stop, : stop if cuts else t].contiguous()))
        start = stop
    return projected, table, blocks


def gradients(function: Any, projected: Tensor, table: Tensor, *rest: Any) -> list[Tensor]:
    """Values, gate and both gradients of a random weighting of all."""
    leaves = projected.clone().requires_grad_(), table.clone().requires_grad_()
    values, gate = function(*leaves, *rest)
    weighting = torch.linspace(-1, 2, values.numel()).view(values.shape).to(values.dtype)
    ((values * weighting).sum() + (gate * weighting.flip(0)).sum()).backward()
    return [values.detach(), gate.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@PROPERTY
@given(
    kind=KINDS,
    seed=st.integers(0, 9999),
    b=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 6), max_size=3, unique=True).map(sorted),
    shared=st.booleans(),
)
def test_fast_and_plain_attention_agree_forward_and_backward(
    kind: AttentionKind, seed: int, b: int, cuts: list[int], shared: bool
) -> None:
    projected, table, blocks = case(seed, b, 7, cuts, shared)
    for fast, plain in zip(
        gradients(attention, projected, table, blocks, kind),
        gradients(plain_attention, projected, table, blocks, kind),
        strict=True,
    ):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("cuts", [[], [2, 4]])
def test_gradients_are_those_of_differences(normaliser: str, cuts: list[int]) -> None:
    projected, table, blocks = case(1, 2, 5, cuts, shared=False)
    kind = AttentionKind(heads=2, normaliser=normaliser, length=3, scale=0.7)

    def of(p: Tensor, open_biases: Tensor) -> tuple[Tensor, Tensor]:
        return attention(p, torch.cat([open_biases, table[-2:]]), blocks, kind)

    assert torch.autograd.gradcheck(of, (projected.requires_grad_(), table[:-2].clone().requires_grad_()))


def test_an_entry_that_is_closed_lets_nothing_through() -> None:
    """Not a little: exactly nothing, whatever stands there, in every precision."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        projected, table, blocks = case(2, 2, 6, [3], shared=True)
        table, kind = table.to(dtype), AttentionKind(heads=2, length=4)
        loud = projected.clone()
        loud[:, 4:] *= 50.0
        one, other = (attention(p.to(dtype), table, blocks, kind)[0] for p in (projected, loud))
        assert torch.equal(one[:, :4], other[:, :4])
        assert not torch.equal(one[:, 4:], other[:, 4:])
        leaf = projected.to(dtype).requires_grad_()
        attention(leaf, table, blocks, kind)[0][:, :4].sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad[:, 4:].any()
        assert leaf.grad[:, :4].any()


def test_without_gradients_the_values_are_the_same() -> None:
    projected, table, blocks = case(3, 2, 6, [3], shared=False)
    kind = AttentionKind(heads=3, length=4)
    trained = attention(projected.requires_grad_(), table, blocks, kind)[0]
    with torch.no_grad():
        assert torch.equal(attention(projected, table, blocks, kind)[0], trained)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_bfloat16_is_the_same_up_to_its_precision(normaliser: str) -> None:
    projected, table, blocks = case(4, 3, 7, [4], shared=False)
    kind = AttentionKind(heads=2, normaliser=normaliser, length=5)
    exact = gradients(attention, projected, table, blocks, kind)
    rounded = gradients(attention, projected.bfloat16(), table.float(), blocks, kind)
    assert [x.dtype for x in rounded] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    for a, b in zip(exact, rounded, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()  # a bfloat16 has 8 bits: 0.4 percent an operation


def test_the_gradient_of_the_table_adds_up_in_float32() -> None:
    """4,096 equal gradients of one entry, which a bfloat16 stops counting at 256."""
    b, t = 64, 8
    projected = torch.ones(b, t, 4, dtype=torch.bfloat16)
    table = torch.zeros(1, requires_grad=True)
    block = Block(0, t, torch.zeros(b, t, t, dtype=torch.int64))
    values, _ = attention(projected, table, [block], AttentionKind(heads=1, activated=False))
    values.sum().backward()
    slope = 1 / (1 + math.exp(-1.0)) * (1 + 1 / (1 + math.exp(1.0)))  # of SiLU at q·k = 1
    assert table.grad is not None
    assert table.grad.item() == pytest.approx(b * t * t * slope, rel=4e-3)


def test_vectorised_it_is_the_plain_one() -> None:
    projected, table, blocks = case(5, 2, 6, [3], shared=True)
    kind = AttentionKind(heads=2, length=4)
    scales = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    many = torch.vmap(lambda scale: attention(scale * projected, table, blocks, kind)[0])(scales)
    for scale, one in zip(scales, many, strict=True):
        torch.testing.assert_close(one, attention(scale * projected, table, blocks, kind)[0])


# -- layer norm and dropout ---------------------------------------------------------------------------------------


@PROPERTY
@given(
    seed=st.integers(0, 999),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 9),
    shift=st.sampled_from([0.0, 100.0]),
    epsilon=st.sampled_from([1e-6, 1e-2]),
)
def test_layer_norm_is_torchs(seed: int, shape: list[int], width: int, shift: float, epsilon: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, width, generator=rng, dtype=torch.float64) + shift
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = layer_norm(one, epsilon), F.layer_norm(other, (width,), eps=epsilon)
    torch.testing.assert_close(ours, theirs)
    weighting = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    for result in (ours, theirs):
        (result * weighting).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_layer_norm_of_bfloat16_is_float32() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer_norm(x, 1e-6)
    torch.testing.assert_close(y, F.layer_norm(x.float(), (8,), eps=1e-6))
    y[:, 0].sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("probability", [0.01, 0.2, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(40_001)  # no multiple of four
    y = dropout(x, probability, training=True)
    share = (y == 0).double().mean().item()
    error = math.sqrt(probability * (1 - probability) / len(x))
    assert abs(share - probability) < 4 * error + 2**-16
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - probability)), rtol=1e-2, atol=0)
    rounded = round(probability * 2**16) / 2**16
    assert y.max().item() == pytest.approx(1 / (1 - rounded), rel=1e-6)


def test_dropout_decides_every_element_by_itself() -> None:
    """Neighbours share a random word: pairs at every distance up to eight must be uncorrelated."""
    torch.manual_seed(1)
    dropped = (dropout(torch.ones(100_000), 0.3, training=True) == 0).double() - 0.3
    for distance in range(1, 9):
        correlation = (dropped[:-distance] * dropped[distance:]).mean() / 0.21
        assert abs(correlation) < 4 / math.sqrt(100_000)


def test_dropout_follows_the_seed_and_rests_outside_training() -> None:
    x = torch.ones(3, 5, 7, requires_grad=True)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.4, training=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    draws[0].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, draws[0].detach())
    assert dropout(x, 0.4, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert dropout(x.to(torch.bfloat16), 0.4, training=True).dtype == torch.bfloat16
