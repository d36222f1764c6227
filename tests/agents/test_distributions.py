"""What agents do with distributions over titles: draws by inverse CDF at their ends, and the divergence."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsim_gr.agents.distributions import divergence, drawn_titles
from recsim_gr.prefixes import MASKED

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)

ENDS = (0.0, 1e-38, 2.0**-24, 1.0 - 2.0**-23, 1.0 - 2.0**-24, 1.0)


def random_rows(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- draws --------------------------------------------------------------------------------------------------------


def test_draws_by_hand() -> None:
    """Weights 0, 2, 0, 1, 1, 0: title 1 up to u = ½, title 3 up to ¾, title 4 up to 1, both ends included."""
    weights, u = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99, 1.0])
    assert drawn_titles(weights, u).tolist() == [1, 1, 3, 3, 4, 4, 4]
    assert drawn_titles(weights.expand(2, 3, 6), u.expand(2, 3, 7)).tolist() == [[[1, 1, 3, 3, 4, 4, 4]] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("closed", "least", "most"),
    [([0], 1, 6), ([6], 0, 5), ([0, 1, 5, 6], 2, 4), ([0, 1, 2, 4, 5, 6], 3, 3), ([1, 2, 3, 4, 5, 6], 0, 0)],
    ids=["first", "last", "both ends", "all but one", "all but the first"],
)
def test_closed_titles_are_not_drawn_at_the_ends(closed: list[int], least: int, most: int, dtype: torch.dtype) -> None:
    """Weights as agents have them: of log-probabilities, of a softmax, and of logits less their largest."""
    u = torch.tensor([ENDS] * 50, dtype=dtype)
    logits = random_rows(0, 50, 7, dtype=dtype)
    logits[:, closed] = MASKED
    every = [torch.log_softmax(logits, dim=-1).exp(), torch.softmax(logits, dim=-1)]
    every += [(logits - logits.amax(dim=1, keepdim=True)).exp()]
    for weights in every:
        titles = drawn_titles(weights, u)
        assert not torch.isin(titles, torch.tensor(closed)).any()
        assert (titles[:, 0] == least).all()
        assert (titles[:, -1] == most).all()


@PROPERTY
@given(st.integers(0, 2**32), st.floats(0.0, 0.95), st.sampled_from([torch.float32, torch.float64]))
def test_a_title_without_weight_is_never_drawn(seed: int, barred: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(np.exp(8 * rng.standard_normal((40, 30)))).to(dtype)
    gone = torch.from_numpy(rng.random((40, 30)) < barred)
    gone[torch.arange(40), torch.from_numpy(rng.integers(0, 30, 40))] = False
    u = torch.cat([torch.tensor([ENDS] * 40), torch.from_numpy(rng.random((40, 20), dtype=np.float32))], dim=1)
    titles = drawn_titles(weights.masked_fill(gone, 0.0), u.to(dtype))
    assert not gone.gather(1, titles).any()


def test_draws_have_the_frequencies_of_the_weights() -> None:
    """Within four standard errors; NumPy's cumulative sum in double precision agrees title by title."""
    weights, n = torch.tensor([0.0, 8.0, 0.0, 7.0, 4.0, 1.0, 0.0]), 40_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    titles = drawn_titles(weights, u)
    share = weights / weights.sum()
    counts = torch.bincount(titles, minlength=7)
    assert ((counts - n * share).abs() <= 4 * torch.sqrt(n * share * (1 - share))).all()
    expected = np.searchsorted(np.cumsum(weights.double().numpy()), 20 * u.double().numpy(), side="right")
    assert (titles.numpy() != expected).mean() < 1e-3


def test_what_is_drawn_is_a_title_even_from_nan() -> None:
    """So that a policy that diverged is reported by whoever looks at its loss, not by a failing index."""
    for bad in (torch.full((2, 5), torch.nan), torch.tensor([[1.0, torch.nan, 1.0], [0.0, 0.0, 0.0]])):
        titles = drawn_titles(bad, torch.rand(2, 9, generator=torch.Generator().manual_seed(0)))
        assert titles.min() >= 0
        assert titles.max() < bad.shape[1]


# -- divergence ---------------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    """(½, ½) from (¼, ¾): ½ ln 2 + ½ ln ⅔ = .14384."""
    got = divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    assert got.item() == pytest.approx(0.5 * math.log(4 / 3))
    assert got.item() == pytest.approx(0.14384, abs=1e-5)


@PROPERTY
@given(st.integers(0, 99))
def test_divergence_is_least_at_the_reference(seed: int) -> None:
    one, two = torch.log_softmax(random_rows(seed, 2, 5), dim=-1)
    assert divergence(one, two) > 0
    assert divergence(one, one) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: drawn_titles(torch.ones(2, 3), torch.ones(2)),
        lambda: drawn_titles(torch.ones(2, 3), torch.ones(1, 4)),
        lambda: divergence(torch.zeros(2, 3), torch.zeros(3)),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="takes"):
        call()
