"""Cross-entropy over the catalogue against brute force, its gradients, its limits, its memory; samples of titles."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recsim_gr import softmax
from recsim_gr.errors import ConfigError
from recsim_gr.sampled_softmax import Sampler, Softmax, SoftmaxConfig, inclusion_probabilities
from recsim_gr.softmax import Closed, Sample, cross_entropies, rows_of_a_chunk, weighted_cross_entropy

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def random_state_kept() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Case(NamedTuple):
    """A random problem, in float64."""

    states: Tensor
    directions: Tensor
    chosen: Tensor
    weights: Tensor
    closed: Closed
    sample: Sample | None
    chunk_rows: int


@st.composite
def cases(draw: st.DrawFn, sampled: bool | None = None) -> Case:
    n, i, d = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    scale = draw(st.sampled_from([0.1, 3.0, 40.0]))  # the last has logits beyond what needs no shift
    generator = torch.Generator().manual_seed(draw(SEEDS))
    states = torch.randn(n, d, generator=generator, dtype=torch.float64)
    directions = scale * torch.randn(i, d, generator=generator, dtype=torch.float64)
    chosen = torch.randint(i, (n,), generator=generator)
    shut = torch.rand(n, i, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    rows, titles = shut.nonzero(as_tuple=True)
    users = unreleased = None
    if draw(st.booleans()):
        users = torch.randint(3, (n,), generator=generator)
        unreleased = torch.rand(3, i, generator=generator) < 0.3
    sample = None
    if draw(st.booleans()) if sampled is None else sampled:
        drawn = torch.randperm(i, generator=generator)[: draw(st.integers(1, i))]
        sample = Sample(drawn, 1.0 + 3.0 * torch.rand(len(drawn), generator=generator))
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    closed = Closed(rows, titles, users, unreleased)
    return Case(states, directions, chosen, weights, closed, sample, draw(st.integers(0, n + 1)))


def brute(case: Case) -> Tensor:
    """ℓ_i of every row, title by title."""
    losses = []
    for row, y in enumerate(case.chosen.tolist()):
        logits = [case.states[row] @ direction for direction in case.directions]
        closed = set(case.closed.titles[case.closed.rows == row].tolist())
        if case.closed.unreleased is not None and case.closed.users is not None:
            closed |= set(case.closed.unreleased[case.closed.users[row]].nonzero().flatten().tolist())
        terms = [logits[y]]
        if case.sample is None:
            terms += [logits[j] for j in range(len(logits)) if j not in closed and j != y]
        else:
            drawn = zip(case.sample.titles.tolist(), case.sample.factors.double(), strict=True)
            terms += [logits[j] + factor.log() for j, factor in drawn if j not in closed and j != y]
        losses.append(torch.logsumexp(torch.stack(terms), dim=0) - logits[y])
    return torch.stack(losses)


def gradients(loss: Callable[[Tensor, Tensor], Tensor], case: Case) -> tuple[Tensor, Tensor]:
    states, directions = case.states.clone().requires_grad_(), case.directions.clone().requires_grad_()
    by_states, by_directions = torch.autograd.grad(loss(states, directions), (states, directions))
    return by_states, by_directions


# -- against brute force -----------------------------------------------------------------------------------------


def test_a_case_by_hand() -> None:
    # logits 1, 0, 2; the second chosen: log(e^1 + e^0 + e^2) - 0 = 2.4076; with the third closed log(e + 1) = 1.3133
    states, directions = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    chosen = torch.tensor([1, 1])
    closed = Closed(torch.tensor([1]), torch.tensor([2]))
    expected = [2.4076, 1.3133]
    torch.testing.assert_close(
        cross_entropies(states, directions, chosen, closed), torch.tensor(expected), atol=1e-4, rtol=0
    )
    loss = weighted_cross_entropy(states, directions, chosen, torch.tensor([3.0, 10.0]), closed)
    assert loss.item() == pytest.approx(3 * expected[0] + 10 * expected[1], abs=1e-3)


@PROPERTY
@given(cases())
def test_losses_and_gradients_are_those_of_brute_force(case: Case) -> None:
    arguments = case.closed, case.sample, case.chunk_rows
    losses = cross_entropies(case.states, case.directions, case.chosen, *arguments)
    torch.testing.assert_close(losses, brute(case), atol=1e-9, rtol=1e-9)
    weighted = weighted_cross_entropy(case.states, case.directions, case.chosen, case.weights, *arguments)
    torch.testing.assert_close(weighted, brute(case) @ case.weights, atol=1e-9, rtol=1e-9)
    expected = gradients(lambda s, v: brute(case._replace(states=s, directions=v)) @ case.weights, case)
    for loss in (
        lambda s, v: weighted_cross_entropy(s, v, case.chosen, case.weights, *arguments),
        lambda s, v: cross_entropies(s, v, case.chosen, *arguments) @ case.weights,
    ):
        for found, right in zip(gradients(loss, case), expected, strict=True):
            torch.testing.assert_close(found, right, atol=1e-8, rtol=1e-8)


@PROPERTY
@given(cases())
def test_float32_agrees_with_float64(case: Case) -> None:
    states, directions = case.states.float(), case.directions.float()
    losses = cross_entropies(states, directions, case.chosen, case.closed, case.sample, case.chunk_rows)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), brute(case), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sampled", [False, True])
def test_gradients_by_finite_differences(sampled: bool) -> None:
    states = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    directions = (2 * torch.randn(6, 3, dtype=torch.float64)).requires_grad_()
    chosen, weights = torch.randint(6, (5,)), torch.rand(5, dtype=torch.float64)
    closed = Closed(torch.tensor([0, 0, 3]), torch.tensor([1, 2, 4]))
    sample = Sample(torch.tensor([4, 0, 1]), torch.tensor([1.5, 2.0, 1.0])) if sampled else None
    assert torch.autograd.gradcheck(lambda s, v: cross_entropies(s, v, chosen, closed, sample, 2), (states, directions))
    assert torch.autograd.gradcheck(
        lambda s, v: weighted_cross_entropy(s, v, chosen, weights, closed, sample, 2), (states, directions)
    )


# -- limits ------------------------------------------------------------------------------------------------------


def test_a_row_without_a_choice_loses_and_teaches_nothing() -> None:
    states, directions = torch.randn(1, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    closed = Closed(torch.tensor([0, 0]), torch.tensor([0, 2]))
    loss = cross_entropies(states, directions, torch.tensor([1]), closed).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert states.grad is not None
    assert directions.grad is not None
    assert not states.grad.any()
    assert not directions.grad.any()


def test_what_was_chosen_was_a_choice() -> None:
    states, directions, chosen = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([1, 1])
    closed = Closed(torch.tensor([0, 0]), torch.tensor([1, 2]))
    without = Closed(torch.tensor([0]), torch.tensor([2]))
    torch.testing.assert_close(
        cross_entropies(states, directions, chosen, closed), cross_entropies(states, directions, chosen, without)
    )


@pytest.mark.parametrize("gap", [5.0, 25.0, 35.0, 80.0])
def test_losses_of_what_is_all_but_certain_are_exact(gap: float) -> None:
    states, directions = torch.tensor([[gap / 2]]), torch.tensor([[1.0], [-1.0]])
    loss = cross_entropies(states, directions, torch.tensor([0])).item()
    assert loss == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-4)


@pytest.mark.parametrize("gap", [80.0, 300.0, 5_000.0])
def test_losses_of_what_is_all_but_impossible_are_finite(gap: float) -> None:
    states = torch.tensor([[gap / 2]], requires_grad=True)
    directions = torch.tensor([[1.0], [-1.0]])
    loss = cross_entropies(states, directions, torch.tensor([1]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(gap, rel=1e-6)
    assert states.grad is not None
    assert states.grad.item() == pytest.approx(2.0)  # v_0 − v_1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_hidden(bad: float) -> None:
    states = torch.randn(3, 2)
    states[1, 0] = bad
    losses = cross_entropies(states, torch.randn(4, 2), torch.zeros(3, dtype=torch.int64), chunk_rows=1)
    assert torch.isfinite(losses).tolist() == [True, False, True]


def test_no_rows_are_no_loss() -> None:
    states, directions = torch.randn(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = weighted_cross_entropy(states, directions, none, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert directions.grad is not None
    assert not directions.grad.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(4, 5\), \(2,\)"):
        cross_entropies(torch.randn(2, 3), torch.randn(4, 5), torch.zeros(2, dtype=torch.int64))
    fitting = torch.randn(2, 3), torch.randn(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weights must be \(2,\) numbers"):
        weighted_cross_entropy(*fitting, torch.ones(3))
    with pytest.raises(ValueError, match="use cross_entropies"):
        weighted_cross_entropy(*fitting, torch.ones(2, requires_grad=True))


# -- precision, transforms, memory -------------------------------------------------------------------------------


def cosine_problem(n: int, i: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    states = F.normalize(torch.randn(n, d), dim=1).requires_grad_()
    directions = (20 * F.normalize(torch.randn(i, d), dim=1)).requires_grad_()
    return states, directions, torch.randint(i, (n,))


def test_autocast_takes_bfloat16_products_and_float32_losses() -> None:
    states, directions, chosen = cosine_problem(300, 200, 32)
    weights = torch.full((300,), 1 / 300)
    exact = weighted_cross_entropy(states, directions, chosen, weights)
    exact_gradients = torch.autograd.grad(exact, (states, directions))
    for loss in (
        lambda: weighted_cross_entropy(states, directions, chosen, weights),
        lambda: cross_entropies(states, directions, chosen) @ weights,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss()
        for gradient, right in zip(torch.autograd.grad(found, (states, directions)), exact_gradients, strict=True):
            assert gradient.dtype == torch.float32
            error = (gradient - right).norm() / right.norm()
            assert 0.0 < error < 0.02  # not 0: it was bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        losses = cross_entropies(states, directions, chosen)
    assert losses.dtype == torch.float32
    # a logit of 20 is rounded by a 512th of itself, and the mean of 300 such errors is small
    assert losses.mean().item() == pytest.approx(exact.item(), abs=0.01)
    assert not torch.equal(losses, cross_entropies(states, directions, chosen))


def test_bfloat16_rows_are_known_to_autograd_as_such() -> None:
    states, directions, chosen = cosine_problem(40, 30, 8)
    half = states.detach().bfloat16().requires_grad_()
    cross_entropies(half, directions, chosen).mean().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert directions.grad is not None
    assert directions.grad.dtype == torch.float32


def test_float16_does_not_overflow() -> None:
    states, directions, chosen = cosine_problem(40, 30, 8)
    with torch.autocast("cpu", torch.float16):
        losses = cross_entropies(states, directions, chosen)
    torch.testing.assert_close(losses, cross_entropies(states, directions, chosen))


@pytest.mark.parametrize("sampled", [False, True])
def test_functional_transforms_and_compilers_get_the_same_numbers(sampled: bool) -> None:
    states, directions, chosen = cosine_problem(12, 9, 4)
    weights = torch.rand(12)
    sample = Sample(torch.tensor([1, 5, 7]), torch.tensor([1.0, 2.0, 4.0])) if sampled else None
    closed = Closed(
        torch.tensor([0, 2]),
        torch.tensor([3, 5]),
        torch.zeros(12, dtype=torch.int64),
        torch.eye(9, dtype=torch.bool)[:1],
    )

    def loss(states: Tensor) -> Tensor:
        by_row = cross_entropies(states, directions, chosen, closed, sample)
        return weighted_cross_entropy(states, directions, chosen, weights, closed, sample) + 2.0 * by_row.sum()

    expected = loss(states)
    (gradient,) = torch.autograd.grad(expected, states)
    both = torch.stack([states.detach(), 0.5 * states.detach()])
    each = torch.vmap(loss)(both)
    torch.testing.assert_close(each[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(states.detach()), gradient, atol=1e-5, rtol=1e-5)
    compiled = torch.compile(loss, backend="eager")(states)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, states)[0], gradient, atol=1e-5, rtol=1e-5)


class Allocations(TorchDispatchMode):
    """The sizes of all memory that operations return, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[int, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.kept[storage.data_ptr()] = storage.nbytes(), tensor  # kept, so that no address comes twice
        return result

    def largest(self) -> list[int]:
        return sorted((size for size, _ in self.kept.values()), reverse=True)


@pytest.mark.parametrize("by_row", [False, True])
def test_logits_exist_once_or_some_rows_at_a_time(by_row: bool) -> None:
    n, i, d = 600, 900, 4
    states, directions, chosen = cosine_problem(n, i, d)
    logits, weights = 4 * n * i, torch.ones(n)

    def step(chunk_rows: int) -> list[int]:
        with Allocations() as seen:
            if by_row:
                loss = cross_entropies(states, directions, chosen, chunk_rows=chunk_rows).sum()
            else:
                loss = weighted_cross_entropy(states, directions, chosen, weights, chunk_rows=chunk_rows)
            loss.backward()
        return seen.largest()

    at_once = step(n)
    passes = 2 if by_row else 1  # one after the other
    assert at_once[:passes] == [logits] * passes
    assert sum(at_once[passes:]) < 0.5 * logits  # all that ever was, so 1.5 times the logits at most
    chunked = step(50)
    assert chunked[0] == logits // 12
    assert sum(chunked) < 0.6 * logits


@pytest.mark.parametrize(
    ("rows", "titles", "chunk_rows", "expected"),
    [(6_400, 1_000, 0, 915), (6_400, 20_000, 0, 256), (100, 1_000, 0, 100), (10, 5, 4, 4), (0, 5, 0, 1)],
)
def test_chunks_are_what_the_cache_holds(rows: int, titles: int, chunk_rows: int, expected: int) -> None:
    # 2^22 bytes hold 1,048 rows of 1,000 float32; 6,400 rows are then 7 chunks of 915 at most
    assert rows_of_a_chunk(rows, titles, chunk_rows) == expected


# -- samples -----------------------------------------------------------------------------------------------------


@st.composite
def shares(draw: st.DrawFn) -> tuple[Tensor, int]:
    values = draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
    return torch.tensor(values, dtype=torch.float64), draw(st.integers(1, len(values) + 2))


@PROPERTY
@given(shares())
def test_inclusion_probabilities_add_up_and_keep_proportions(drawn: tuple[Tensor, int]) -> None:
    values, size = drawn
    found = inclusion_probabilities(values, size)
    assert found.sum().item() == pytest.approx(min(size, len(values)))
    assert (found > 0).all()
    assert (found <= 1).all()
    open_ones = found < 1
    ratios = found[open_ones] / values[open_ones]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    if open_ones.any() and not open_ones.all():  # what is certain would have got more than 1 at that rate
        assert (values[~open_ones] * ratios[0] >= 1 - 1e-9).all()


def test_titles_nobody_chose_are_drawn_too() -> None:
    found = inclusion_probabilities(torch.tensor([0.0, 2.0, 4.0]), 1)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))
    torch.testing.assert_close(inclusion_probabilities(torch.zeros(4), 2), torch.full((4,), 0.5, dtype=torch.float64))


DRAWS = 4_000


@pytest.fixture(scope="module")
def many_draws() -> tuple[Sampler, list[Sample]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sampler = Sampler(torch.arange(1, 31).square(), 6)
        return sampler, [sampler.draw() for _ in range(DRAWS)]


def test_samples_hold_different_titles_as_often_as_they_should(many_draws: tuple[Sampler, list[Sample]]) -> None:
    sampler, samples = many_draws
    assert all(len(sample.titles.unique()) == len(sample.titles) == 6 for sample in samples)
    counts = torch.bincount(torch.cat([sample.titles for sample in samples]), minlength=30)
    p = sampler.inclusion
    deviations = (counts - DRAWS * p) / (DRAWS * p * (1 - p)).sqrt().clamp(min=1e-9)
    assert deviations.abs().max() < 4.5
    torch.testing.assert_close(samples[0].factors, (1 / p[samples[0].titles]).float())


def test_the_corrected_partition_function_is_unbiased(many_draws: tuple[Sampler, list[Sample]]) -> None:
    _, samples = many_draws
    state, directions = torch.randn(5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    terms = (directions @ state).exp()
    estimates = torch.stack([(terms[sample.titles] * sample.factors).sum() for sample in samples])
    error = estimates.std() / math.sqrt(DRAWS)
    assert abs(estimates.mean() - terms.sum()) < 4 * error
    assert error < 0.05 * terms.sum()  # else the test could not fail
    uncorrected = torch.stack([terms[sample.titles].sum() for sample in samples]).mean()
    assert abs(uncorrected * 5 - terms.sum()) > 10 * error  # 30 titles over 6, as if all were as likely


@PROPERTY
@given(cases(sampled=False), st.integers(0, 3))
def test_a_sample_of_all_is_the_full_softmax(case: Case, more: int) -> None:
    n = len(case.directions)
    sample = Sampler(torch.rand(n), n + more).draw()
    arguments = case.states, case.directions, case.chosen, case.closed
    torch.testing.assert_close(cross_entropies(*arguments, sample), cross_entropies(*arguments))


def test_sampled_losses_approach_the_full_one() -> None:
    states, directions, chosen = cosine_problem(400, 1_000, 16)
    directions = directions / 4  # logits within ±5, as early in training: a few titles are not all of the sum
    full = cross_entropies(states, directions, chosen).mean().item()
    errors = []
    for size in (10, 100, 900):
        sampler = Sampler(torch.rand(1_000) + 0.1, size)
        sampled = [cross_entropies(states, directions, chosen, None, sampler.draw()).mean() for _ in range(20)]
        errors.append(abs(torch.stack(sampled).mean().item() - full))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


def test_equal_seeds_draw_equal_samples() -> None:
    sampler = Sampler(torch.rand(50), 7)
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(sampler.draw().titles.tolist())
    assert drawn[0] == drawn[1] != drawn[2]


# -- configs -----------------------------------------------------------------------------------------------------


def test_auto_samples_in_large_catalogues_alone() -> None:
    config = SoftmaxConfig(largest_full=100, negatives=10)
    assert [config.samples(n) for n in (10, 100, 101)] == [False, False, True]
    assert not SoftmaxConfig(kind="full").samples(10**6)
    assert SoftmaxConfig(kind="sampled", negatives=10).samples(11)
    assert not SoftmaxConfig(kind="sampled", negatives=10).samples(10)


def test_a_softmax_samples_by_popularity_or_alike() -> None:
    counts = torch.tensor([0, 1, 8, 0])
    config = SoftmaxConfig(kind="sampled", negatives=1)
    by_popularity = Softmax(config, 4, counts).sampler
    assert by_popularity is not None
    torch.testing.assert_close(by_popularity.inclusion * 13, torch.tensor([1.0, 2.0, 9.0, 1.0], dtype=torch.float64))
    alike = Softmax(SoftmaxConfig(kind="sampled", negatives=2, proposal="uniform"), 4).sampler
    assert alike is not None
    torch.testing.assert_close(alike.inclusion, torch.full((4,), 0.5, dtype=torch.float64))
    assert Softmax(SoftmaxConfig(), 4).sample() is None
    with pytest.raises(ConfigError, match="'uniform' where no counts of titles are given"):
        Softmax(config, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "half"), ("proposal", "taste"), ("negatives", 0), ("largest_full", 0), ("chunk_rows", -1)],
)
def test_senseless_configs_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"SoftmaxConfig\.{field} must be .*, got {value!r}"):
        SoftmaxConfig(**{field: value})


def test_importing_the_losses_does_not_import_a_compiler() -> None:
    import subprocess
    import sys

    code = "import sys, recsim_gr.softmax; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert softmax.in_a_transform() is False
