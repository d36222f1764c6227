"""HSTU against a transcription of its equations by loops, for every switch; and what it knows of order and time."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from recsim_gr.backbones import HSTU, HSTUConfig, Places
from recsim_gr.backbones.hstu import CLOSED_ENTRIES, ROWS, TIME_BUCKETS, HSTULayer, pair_blocks
from recsim_gr.errors import ConfigError

FloatArray = NDArray[np.float64]
Batch = tuple[Tensor, Tensor, Tensor]

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)

N_TITLES, DIMENSIONS, MAX_LENGTH = 9, 6, 5

SWITCHES: list[dict[str, Any]] = [
    {},
    {"positions": False},
    {"distance_bias": False},
    {"time_gaps": False},
    {"positions": False, "time_gaps": False},
    {"time_buckets": "research"},
    {"normaliser": "softmax"},
    {"normaliser": "softmax", "scale_scores": True},
    {"scale_scores": True},
    {"gate": "concatenated"},
    {"activate": False},
    {"residual": False},
    {"scale_input": False},
    {"norm_epsilon": 0.1},
    {"scores": False},
    {"similarity": "dot"},
    {"n_heads": 1},
    {"n_heads": 3, "n_layers": 1},
    {"n_layers": 3},
]


def make(seed: int = 0, n_titles: int = N_TITLES, **further: Any) -> HSTU:
    """A small backbone in eval mode, every parameter far from 0, so that a lost term shows."""
    shape = {"dimensions": DIMENSIONS, "n_layers": 2, "n_heads": 2, "max_length": MAX_LENGTH} | further
    backbone = HSTU(HSTUConfig(**shape), n_titles)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=rng))
    return backbone.eval()


def histories(n: int, length: int, seed: int = 0, n_titles: int = N_TITLES) -> Batch:
    """n full histories without repeats: titles, scores, times in hours with gaps from seconds to weeks."""
    rng = np.random.default_rng(seed)
    titles = np.stack([rng.permutation(n_titles)[:length] for _ in range(n)])
    gaps = np.exp(rng.uniform(-5, 6, size=(n, length)))
    scores = rng.uniform(1, 5, size=(n, length))
    return (
        torch.from_numpy(titles),
        torch.from_numpy(scores).float(),
        torch.from_numpy(gaps.cumsum(axis=1)).float(),
    )


# -- the equations ------------------------------------------------------------------------------------------------


def layer_norm(x: FloatArray, epsilon: float) -> FloatArray:
    return (x - x.mean()) / np.sqrt(x.var() + epsilon)


def silu(x: Any) -> Any:
    return x / (1.0 + np.exp(-x))


def bucket(hours: float, dialect: str) -> int:
    if dialect == "minutes":
        return min(int(math.log2(max(60.0 * abs(hours), 1.0))), 15)
    return min(int(math.log(max(3600.0 * abs(hours), 1.0)) / 0.301), 128)


def tokens(p: dict[str, FloatArray], config: HSTUConfig, titles: FloatArray, scores: FloatArray) -> list[FloatArray]:
    """What goes into the first layer: the opening token, then a token an event."""
    x = [p["first"].copy()]
    for title, score in zip(titles, scores, strict=True):
        embedded = p["titles"][int(title)] * (math.sqrt(config.dimensions) if config.scale_input else 1.0)
        if config.scores:
            embedded = embedded + (score - 3.0) / 2.0 * (p["by_score.weight"] @ embedded + p["score_level"])
        x.append(embedded)
    if config.positions:
        x = [row + p["position"][min(t, config.max_length - 1)] for t, row in enumerate(x)]
    return x


def attended(q: list[FloatArray], k: list[FloatArray], v: list[FloatArray], rab: Any, config: HSTUConfig) -> Any:
    """A V of one head: of each row, over the columns up to it."""
    scale = 1.0 / math.sqrt(len(q[0])) if config.scale_scores else 1.0
    for t, row in enumerate(q):
        scores = np.array([scale * (row @ k[s]) + rab(t, s) for s in range(t + 1)])
        if config.normaliser == "length":
            weights = silu(scores) / config.max_length
        else:
            weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        yield sum(weight * value for weight, value in zip(weights, v[: t + 1], strict=True))


def by_loops(backbone: HSTU, titles: FloatArray, scores: FloatArray, times: FloatArray) -> FloatArray:
    """(T + 1, d) states of one history, in float64, a number at a time:

    U,V,Q,K = split(SiLU(LN(X) W)); A = SiLU(Q Kᵀ + rab) / N, causal; Y = X + W_o (LN(A V) ⊙ U).
    """
    p = {name: value.detach().double().numpy() for name, value in backbone.named_parameters()}
    config = backbone.config
    d, heads, epsilon = config.dimensions, config.n_heads, config.norm_epsilon
    x = tokens(p, config, titles, scores)
    when = [times[0] if len(times) else 0.0, *times]
    for index in range(config.n_layers):
        w = {name.split(".", 2)[2]: value for name, value in p.items() if name.startswith(f"layers.{index}.")}

        def rab(t: int, s: int, w: dict[str, FloatArray] = w) -> float:
            bias = 0.0
            if config.time_gaps:
                bias += w["by_gap"][bucket(when[t] - when[s], config.time_buckets)]
            if config.positions and config.distance_bias:
                bias += w["by_distance"][min(t - s, config.max_length - 1)]
            return bias

        mixed = [layer_norm(row, epsilon) @ w["uvqk"] for row in x]
        mixed = [silu(row) for row in mixed] if config.activate else mixed
        u, v, q, k = ([row[part * d : (part + 1) * d] for row in mixed] for part in range(4))
        by_head = []
        for head in range(heads):
            own = slice(head * d // heads, (head + 1) * d // heads)
            own_q, own_k, own_v = ([row[own] for row in part] for part in (q, k, v))
            by_head.append(list(attended(own_q, own_k, own_v, rab, config)))
        out = []
        for t, row in enumerate(x):
            a = layer_norm(np.concatenate([values[t] for values in by_head]), epsilon)
            gated = a * u[t] if config.gate == "product" else np.concatenate([u[t], a, u[t] * a])
            y = w["out.weight"] @ gated + w["out.bias"]
            out.append(row + y if config.residual else y)
        x = out
    return np.stack([row / np.linalg.norm(row) if config.similarity == "cosine" else row for row in x])


def assert_follows_the_equations(backbone: HSTU, batch: Batch, tolerance: float) -> None:
    with torch.no_grad():
        states = backbone.encode(*batch)
    assert states.shape == (len(batch[0]), batch[0].shape[1] + 1, backbone.config.dimensions)
    for row, state in enumerate(states):
        expected = by_loops(backbone, *(part[row].double().numpy() for part in batch))
        np.testing.assert_allclose(state.numpy(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize("length", [0, 1, MAX_LENGTH, MAX_LENGTH + 3])
def test_states_are_those_of_the_equations(length: int, switch: dict[str, Any]) -> None:
    backbone, batch = make(**switch), histories(3, length)
    assert_follows_the_equations(backbone, batch, 1e-5)
    doubles = (batch[0], batch[1].double(), batch[2].double())
    assert_follows_the_equations(backbone.double(), doubles, 1e-10)


def test_a_fresh_backbone_follows_them_too() -> None:
    torch.manual_seed(3)
    backbone = HSTU(HSTUConfig(max_length=6), N_TITLES).eval()
    assert_follows_the_equations(backbone, histories(2, 6), 1e-5)


@pytest.mark.parametrize("length", [ROWS + ROWS // 2, 2 * ROWS + 11])
def test_sequences_of_several_blocks_follow_them(length: int) -> None:
    backbone = make(max_length=length - 2, n_titles=100).double()
    titles, scores, times = histories(1, length, n_titles=100)
    assert len(pair_blocks(Places(torch.arange(length), times), backbone.config)) >= 2
    assert_follows_the_equations(backbone, (titles, scores.double(), times.double()), 1e-10)


@pytest.mark.parametrize(
    "switch", [x for x in SWITCHES if x and not {"gate", "n_layers", "time_buckets"} & set(x)], ids=str
)
def test_every_switch_changes_the_states(switch: dict[str, Any]) -> None:
    """With the same parameters, less those that a switch takes away."""
    batch, one, other = histories(2, 5), make(), make(**switch)
    assert not other.load_state_dict(one.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        assert (one.encode(*batch) - other.encode(*batch)).abs().max() > 1e-3


def test_gradients_are_those_of_a_plain_layer() -> None:
    """Of every parameter and the input, by torch, of the same equations on whole tensors."""
    layer = make(n_layers=1, dimensions=8, norm_epsilon=1e-3).double().layers[0]
    assert isinstance(layer, HSTULayer)
    batch, t = 3, ROWS + 7
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, t, 8, generator=rng, dtype=torch.float64, requires_grad=True)
    hours = torch.rand(batch, t, generator=rng).mul(30).cumsum(dim=1)
    above = torch.randn(batch, t, 8, generator=rng, dtype=torch.float64)
    gaps = [[[bucket(float(a - b), "minutes") for b in row] for a in row] for row in hours]
    apart = [[min(max(i - j, 0), MAX_LENGTH - 1) for j in range(t)] for i in range(t)]

    def plain(x: Tensor) -> Tensor:
        mixed = F.silu(F.layer_norm(x, (8,), eps=1e-3) @ layer.uvqk).view(batch, t, 4, 2, 4)
        u, v, q, k = mixed.unbind(dim=2)
        rab = layer.by_gap[torch.tensor(gaps)] + layer.by_distance[torch.tensor(apart)]
        weights = F.silu(torch.einsum("bihc,bjhc->bhij", q, k) + rab[:, None]).tril() / MAX_LENGTH
        values = torch.einsum("bhij,bjhc->bihc", weights, v).reshape(batch, t, 8)
        return x + layer.out(F.layer_norm(values, (8,), eps=1e-3) * u.reshape(batch, t, 8))

    blocks = pair_blocks(Places(torch.arange(t), hours), layer.config)
    leaves = [x, *layer.parameters()]
    ours, theirs = layer(x, blocks), plain(x)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, above), torch.autograd.grad(theirs, leaves, above), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_table_of_n_is_one_of_2n_minus_1_under_causality() -> None:
    """The research code's matrix of biases by position: row i, column j reads entry N - 1 + j - i of 2N - 1."""
    n = MAX_LENGTH
    layer = make(time_gaps=False).layers[0]
    assert isinstance(layer, HSTULayer)
    (block,) = pair_blocks(Places(torch.arange(n), torch.zeros(1, n)), layer.config)
    biases = layer.biases().detach()[block.entries[0]]
    table = torch.cat([layer.by_distance.detach().flip(0), torch.full((n - 1,), torch.nan)])
    theirs = torch.stack([table[n - 1 - i : 2 * n - 1 - i] for i in range(n)])
    assert torch.equal(biases.tril(), theirs.nan_to_num(0.0).tril())


# -- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "minutes", "expected"),
    [
        *[("minutes", m, b) for m, b in [(0.0, 0), (0.5, 0), (1.5, 0), (2.5, 1), (3.9, 1), (4.1, 2), (33_000.0, 15)]],
        ("minutes", 1e7, 15),
        # ln(seconds) / 0.301: 1 second and less in bucket 0, e^0.301 = 1.351 s opens bucket 1, and so on
        *[("research", s / 60, b) for s, b in [(0.0, 0), (1.3, 0), (1.4, 1), (60.0, 13), (3600.0, 27), (1.8e6, 47)]],
        ("research", 1e20, 128),
    ],
)
def test_time_gaps_fall_into_the_buckets_of_their_dialect(dialect: str, minutes: float, expected: int) -> None:
    backbone = make(n_layers=1, positions=False, time_buckets=dialect)
    titles, scores, _ = histories(1, 2)
    batch = titles, scores, torch.tensor([[0.0, minutes / 60.0]])
    by_gap = backbone.state_dict()["layers.0.by_gap"]
    assert len(by_gap) == TIME_BUCKETS[dialect].n
    with torch.no_grad():
        before = backbone.encode(*batch)
        by_gap[expected] += 1.0
        assert not torch.equal(backbone.encode(*batch)[0, 2], before[0, 2])
        by_gap[expected] -= 1.0
        for other in set(range(1, len(by_gap))) - {expected}:  # bucket 0 is also that of every token to itself
            by_gap[other] += 1.0
        torch.testing.assert_close(backbone.encode(*batch), before)


@PROPERTY
@given(st.floats(0, 1e6, width=32))
def test_buckets_of_minutes_are_logarithms(hours: float) -> None:
    minutes = float(torch.tensor(hours) * 60.0)  # as float32 rounds it
    found = int(TIME_BUCKETS["minutes"].of(torch.tensor([hours])))
    assert found == math.floor(math.log2(max(minutes, 1.0)))


def test_time_without_gaps_is_nothing() -> None:
    backbone, (titles, scores, times) = make(time_gaps=False), histories(2, 5)
    with torch.no_grad():
        assert torch.equal(backbone.encode(titles, scores, times), backbone.encode(titles, scores, 0.0 * times))


@pytest.mark.parametrize("dialect", TIME_BUCKETS)
@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan, 3e38])
def test_no_time_in_the_padding_is_too_wild(dialect: str, junk: float) -> None:
    backbone, (titles, scores, times) = make(time_buckets=dialect), histories(2, 3)
    padded = torch.cat([titles, torch.full((2, 2), N_TITLES)], dim=1), F.pad(scores, (0, 2))
    with torch.no_grad():
        states = backbone.encode(*padded, F.pad(times, (0, 2), value=junk))[:, :4]
        torch.testing.assert_close(states, backbone.encode(titles, scores, times))


# -- order --------------------------------------------------------------------------------------------------------


BLIND = {"positions": False, "time_gaps": False}


def last_states(backbone: HSTU, batch: Batch, order: list[int]) -> tuple[Tensor, Tensor]:
    """The last state of histories and of the same in another order."""
    titles, scores, times = batch
    with torch.no_grad():
        one = backbone.encode_last(titles, scores, times)
        return one, backbone.encode_last(titles[:, order], scores[:, order], times[:, order])


@PROPERTY
@given(order=st.permutations(range(4)), normaliser=st.sampled_from(["length", "softmax"]))
def test_blind_one_layer_knows_a_set_and_the_last_event(order: list[int], normaliser: str) -> None:
    """The last token attends to the bare tokens before it, whose order leaves no trace."""
    blind = make(n_layers=1, normaliser=normaliser, **BLIND)
    one, two = last_states(blind, histories(1, 5), [*order, 4])
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    sighted = make(n_layers=1, normaliser=normaliser, **BLIND | {"positions": True})
    one, two = last_states(sighted, histories(1, 5), [*order, 4])
    assert ((one - two).abs().max() < 1e-6) == (order == sorted(order))


@PROPERTY
@given(order=st.permutations(range(6)), n_layers=st.integers(1, 3))
def test_blind_every_layer_knows_order_by_causality_alone(order: list[int], n_layers: int) -> None:
    """With the mask opened, so that all tokens read all, tokens in another order have their states in that order."""
    backbone = make(n_layers=n_layers, **BLIND)
    rng = torch.Generator().manual_seed(1)
    x, hours = torch.randn(2, 6, DIMENSIONS, generator=rng), torch.rand(2, 6, generator=rng)
    everything = Places(torch.arange(6), hours, torch.ones(6, 6, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(backbone.mix(x, everything)[:, order], backbone.mix(x[:, order], everything))


@pytest.mark.parametrize("what", ["the last event", "times", "a second layer", "positions"])
def test_order_shows_through(what: str) -> None:
    """By which event was last; by times and positions where they are read; and, through two layers, by causality:
    the states that the second one reads are of the prefixes, and other orders have other prefixes."""
    switches: dict[str, dict[str, Any]] = {
        "times": {"time_gaps": True},
        "positions": {"positions": True},
        "a second layer": {"n_layers": 2},
    }
    backbone = make(**{"n_layers": 1} | BLIND | switches.get(what, {}))
    order = [0, 1, 2, 4, 3] if what == "the last event" else [1, 0, 2, 3, 4]
    one, two = last_states(backbone, histories(1, 5), order)
    assert (one - two).abs().max() > 1e-4


# -- masks, precision, repetition ---------------------------------------------------------------------------------


def test_a_mask_that_is_causal_is_no_mask() -> None:
    """Blocks of rows, against the one block of any mask, shared or a user's own."""
    t = 2 * ROWS + 9
    backbone = make(max_length=t)
    rng = torch.Generator().manual_seed(1)
    x, hours = torch.randn(2, t, DIMENSIONS, generator=rng), torch.rand(2, t, generator=rng).cumsum(dim=1)
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = backbone.mix(x, Places(torch.arange(t), hours))
        for allowed in (causal, causal.expand(2, t, t)):
            torch.testing.assert_close(backbone.mix(x, Places(torch.arange(t), hours, allowed)), expected)


@PROPERTY
@given(seed=st.integers(0, 999))
def test_a_mask_is_obeyed(seed: int) -> None:
    """What a token may not read changes nothing of its state, in one layer."""
    backbone = make(n_layers=1)
    rng = torch.Generator().manual_seed(seed)
    allowed = torch.rand(2, 5, 5, generator=rng) < 0.5
    allowed[:, range(5), range(5)] = True
    x, hours = torch.randn(2, 5, DIMENSIONS, generator=rng), torch.rand(2, 5, generator=rng) * 100
    column = int(torch.randint(0, 5, (1,), generator=rng))
    other = x.clone()
    other[:, column] += torch.randn(2, DIMENSIONS, generator=rng)
    places = Places(torch.arange(5).expand(2, 5), hours, allowed)
    with torch.no_grad():
        moved = (backbone.mix(x, places) - backbone.mix(other, places)).abs().amax(dim=-1)
    assert torch.equal(moved > 0, allowed[:, :, column])


def test_under_autocast_states_and_gradients_stay_close() -> None:
    backbone, batch = make(dimensions=16, n_heads=2), histories(3, 5)

    def run(enabled: bool) -> tuple[Tensor, list[Tensor]]:
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            states = backbone.encode(*batch)
        (states.float() * torch.linspace(-1, 1, 16)).sum().backward()
        return states.float().detach(), [p.grad.clone() for p in backbone.parameters() if p.grad is not None]

    (exact, gradients), (rounded, rounded_gradients) = run(False), run(True)
    assert not torch.equal(exact, rounded)  # bfloat16 it was
    assert (exact - rounded).abs().max() < 0.05
    assert {g.dtype for g in rounded_gradients} == {torch.float32}
    one, other = (torch.cat([g.flatten() for g in all_of_them]) for all_of_them in (gradients, rounded_gradients))
    assert (one - other).norm() < 0.05 * one.norm()


def test_equal_seeds_give_equal_gradients() -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(2)
        backbone = make(max_length=60, n_titles=80).train()
        backbone.encode(*histories(4, 60, n_titles=80)).sum().backward()
        return [p.grad for p in backbone.parameters() if p.grad is not None]

    assert all(torch.equal(one, other) for one, other in zip(gradients(), gradients(), strict=True))


def test_closed_entries_follow_the_biases() -> None:
    layer = make(time_gaps=True, positions=True).layers[0]
    assert isinstance(layer, HSTULayer)
    biases = layer.biases()
    assert len(biases) == MAX_LENGTH * 16 + CLOSED_ENTRIES
    assert (biases[-CLOSED_ENTRIES:] < -1e8).all()
    assert (biases[:-CLOSED_ENTRIES] > -1e2).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 0),
        ("n_heads", 0),
        ("n_heads", 3),  # does not divide 32
        ("normaliser", "batch"),
        ("time_buckets", "hours"),
        ("gate", "none"),
        ("norm_epsilon", 0.0),
        ("norm_epsilon", math.nan),
    ],
)
def test_a_bad_switch_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"HSTUConfig\.{field} must be .*{value}"):
        HSTUConfig(**{field: value})
