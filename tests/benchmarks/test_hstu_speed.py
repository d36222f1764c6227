"""Figures, not verdicts: HSTU's layers beside a plain transcription of the public research code's.

``pytest -m benchmark -s tests/benchmarks/test_hstu_speed.py``; `recsim_gr.processes.ENVIRONMENT` says which variables
workers run with, and what the allocator does without them is a part of the figures.
"""

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsim_gr.backbones import HSTU, HSTUConfig, Places

USERS, DIMENSIONS, HEADS, LAYERS, DROPOUT = 128, 64, 2, 2, 0.2
REPEATS = 9


class PlainLayer(nn.Module):
    """The layer of the research code on padded sequences (its jagged tensors are dense here): every layer computes its
    own buckets and biases, a matrix masks the scores, and the rest is torch's."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.uvqk = nn.Parameter(torch.randn(DIMENSIONS, 4 * DIMENSIONS) * 0.02)
        self.out = nn.Linear(DIMENSIONS, DIMENSIONS)
        self.by_time = nn.Parameter(torch.randn(129) * 0.02)
        self.by_position = nn.Parameter(torch.randn(2 * tokens - 1) * 0.02)

    def bias(self, seconds: Tensor) -> Tensor:
        n = self.tokens
        order = torch.arange(n)
        following = torch.cat([seconds[:, 1:], seconds[:, -1:]], dim=1)
        gaps = (following[:, :, None] - seconds[:, None, :]).abs().clamp(min=1)
        buckets = (torch.log(gaps) / 0.301).long().clamp(0, 128)
        by_time = torch.index_select(self.by_time, 0, buckets.view(-1)).view(buckets.shape)
        return self.by_position[n - 1 + order[None, :] - order[:, None]] + by_time

    def forward(self, x: Tensor, seconds: Tensor, mask: Tensor) -> Tensor:
        b, n, d = x.shape
        mixed = F.silu(F.layer_norm(x, (d,), eps=1e-6) @ self.uvqk)
        u, v, q, k = mixed.split(d, dim=-1)
        q, k, v = (part.view(b, n, HEADS, -1) for part in (q, k, v))
        scores = torch.einsum("bnhc,bmhc->bhnm", q, k) + self.bias(seconds).unsqueeze(1)
        weights = F.silu(scores) / n * mask
        values = torch.einsum("bhnm,bmhc->bnhc", weights, v).reshape(b, n, d)
        gated = u * F.layer_norm(values, (d,), eps=1e-6)
        return x + self.out(F.dropout(gated, DROPOUT, self.training))


def in_turns(jobs: dict[str, Callable[[], None]], each: int = 3) -> dict[str, float]:
    """CPU milliseconds of the fastest of several repeats, taken in turns, since others load the machine."""
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(REPEATS):
        for name, job in jobs.items():
            start = time.process_time()
            for _ in range(each):
                job()
            best[name] = min(best[name], (time.process_time() - start) / each * 1e3)
    return best


@pytest.mark.benchmark
@pytest.mark.parametrize("events", [20, 50, 200])
def test_a_layer_forward_and_backward(events: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n = events + 1
    config = HSTUConfig(dimensions=DIMENSIONS, n_heads=HEADS, n_layers=LAYERS, max_length=n, dropout=DROPOUT)
    ours, plain = HSTU(config, 1).train(), nn.ModuleList(PlainLayer(n) for _ in range(LAYERS)).train()
    x = torch.randn(USERS, n, DIMENSIONS, requires_grad=True)
    hours = torch.rand(USERS, n).mul(24).cumsum(dim=1)
    seconds, mask, places = (hours * 3600).long(), torch.ones(n, n).tril(), Places(torch.arange(n), hours)
    weighting = torch.randn(USERS, n, DIMENSIONS)

    def plainly() -> Tensor:
        y: Tensor = x
        for layer in plain:
            y = layer(y, seconds, mask)
        return y

    def step(forward: Callable[[], Tensor], rounded: bool) -> Callable[[], None]:
        def job() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                y = forward()
            (y.float() * weighting).sum().backward()

        return job

    jobs = {
        f"{name}, {'bfloat16' if rounded else 'float32'}": step(forward, rounded)
        for rounded in (False, True)
        for name, forward in (("plain", plainly), ("ours", lambda: ours.mix(x, places)))
    }
    best = in_turns(jobs, each=1 if events > 100 else 3)
    print(f"\n{USERS} users x {events} events, d {DIMENSIONS}, {HEADS} heads, {LAYERS} layers, one thread, a layer:")
    for name, milliseconds in best.items():
        print(f"  {name:16s} {milliseconds / LAYERS:7.2f} ms   {best['plain, float32'] / milliseconds:.2f}x")


@pytest.mark.benchmark
def test_dropout_and_layer_norm() -> None:
    from recsim_gr.backbones.elementwise import dropout, layer_norm

    torch.set_num_threads(1)
    x = torch.randn(USERS, 51, DIMENSIONS)
    jobs: dict[str, Callable[[], object]] = {
        "torch's dropout": lambda: F.dropout(x, DROPOUT, True),
        "our dropout": lambda: dropout(x, DROPOUT, True),
        "torch's layer norm": lambda: F.layer_norm(x, (DIMENSIONS,)),
        "our layer norm": lambda: layer_norm(x, 1e-5),
    }
    for name, milliseconds in in_turns({k: lambda job=job: (job(), None)[1] for k, job in jobs.items()}).items():  # type: ignore[misc]
        print(f"\n  {name:20s} {milliseconds:.2f} ms", end="")
