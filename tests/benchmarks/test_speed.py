"""Figures, not verdicts (``pytest -m benchmark -s tests/benchmarks/test_speed.py``): nothing fails for being slow."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.histories import Histories
from recsim_gr.prefixes import chosen_log_probs, imitation_loss, prefix_logits, prefix_mask, prefix_states
from recsim_gr.reward_heads import Scorer
from recsim_gr.rewards import member_loss
from recsim_gr.world import World, WorldConfig

MEMBERS = 3


def best_milliseconds(work: Callable[[], object], repeats: int = 8, each: int = 5) -> float:
    """CPU milliseconds of the fastest of several repeats."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(each):
            work()
        times.append((time.process_time() - start) / each * 1e3)
    return min(times)


@pytest.fixture(scope="module")
def histories() -> Histories:
    torch.set_num_threads(1)
    return Histories(World(WorldConfig(n_titles=200)).generate_log(256))


@pytest.fixture(scope="module")
def backbone() -> HSTU:
    return HSTU(HSTUConfig(n_layers=1, dropout=0.1, max_length=20), 200).train()


@pytest.mark.benchmark
def test_ensemble_members_one_by_one_or_in_one_batched_program(histories: Histories, backbone: HSTU) -> None:
    """A gradient step of all members: a loop, against torch.func's vmap over stacked parameters."""
    members = [Scorer(backbone, 3.0).train() for _ in range(MEMBERS)]
    batch = histories.batch(torch.arange(64))

    def loop() -> None:
        for member in members:
            member_loss(member, batch, 0.2).backward()

    stacked, _ = torch.func.stack_module_state(members)
    shell = Scorer(backbone, 3.0).train()

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.member = shell

        def forward(self) -> Tensor:
            return member_loss(self.member, batch, 0.2)

    wrapper = Loss()

    def one(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(wrapper, {f"member.{k}": v for k, v in parameters.items()}, ())

    def batched() -> None:
        torch.vmap(one, randomness="different")(stacked).sum().backward()

    sequential, vectorised = best_milliseconds(loop), best_milliseconds(batched)
    print(f"\n{MEMBERS} members: loop {sequential:.1f} ms, vmap {vectorised:.1f} ms, {sequential / vectorised:.2f}x")


@pytest.mark.benchmark
def test_a_step_of_imitation_and_its_parts(histories: Histories, backbone: HSTU) -> None:
    """What a step is made of, and its tokens a second on one thread."""
    batch = histories.batch(torch.arange(64))
    optimiser = torch.optim.AdamW(backbone.parameters(), fused=True)

    def step() -> None:
        optimiser.zero_grad()
        imitation_loss(backbone, batch).backward()
        optimiser.step()

    whole = best_milliseconds(step)
    encode = best_milliseconds(lambda: prefix_states(backbone, batch))
    logits = best_milliseconds(
        lambda: chosen_log_probs(torch.log_softmax(prefix_logits(backbone, batch), dim=-1), batch)
    )
    mask = best_milliseconds(lambda: prefix_mask(batch, 200))
    tokens = batch.titles.numel() / whole
    print(
        f"\nstep {whole:.1f} ms = {tokens:.0f} k tokens/s; forward: states {encode:.1f}, with logits {logits:.1f}, "
        f"of which the mask of seen titles {mask:.2f} ms"
    )
