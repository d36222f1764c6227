"""Job ``training`` of suite ``throughput``: training steps of our HSTU beside the public research code's structure.

A step is forward, backward and optimiser, on one batch of full histories. Ours and the reference (`hstu_reference`)
take the same weights, batches and optimiser; in float32, without dropout and with the same titles in the softmax, also
the same losses (a test holds that). Beside the rates: the share of the machine's matrix peak, which is that of one
large product in the same run; what bfloat16 does to a loss curve; and the memory of a step with a large catalogue.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.benchmarks.hstu_reference import Reference, reference_of
from recsim_gr.benchmarks.stopwatch import (
    Timing,
    forget_peak,
    held_bytes,
    in_new_process,
    in_worker_process,
    peak_bytes,
    side_by_side,
)
from recsim_gr.benchmarks.throughput_jobs import OURS, Figure, ThroughputConfig, rates
from recsim_gr.histories import Batch, Histories
from recsim_gr.prefixes import imitation_loss, last_imitation_loss, prefix_states
from recsim_gr.randomness import derived_seed, generator
from recsim_gr.sampled_softmax import Softmax, SoftmaxConfig
from recsim_gr.softmax import weighted_cross_entropy
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

REFERENCE, PEAK = "reference", "matrix peak"
"""Who was measured beside `OURS`."""

DROPOUTS = {"dropout": 0.2, "plain": 0.0}
"""Of the two: as in the research code, and off."""

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """A kind of training step.

    Attributes:
        who: `OURS` or `REFERENCE`.
        precision: float32, or bfloat16 by autocast.
        loss: ``all`` events over all titles; ``unseen``, those without what a user has seen, as we pretrain; ``last``,
            the last event alone.
        compiled: whether the model goes through `torch.compile`.
    """

    who: str
    precision: str = "float32"
    loss: str = "all"
    compiled: bool = False

    @property
    def name(self) -> str:
        """As in the metrics."""
        return f"{self.loss}_{self.precision}{'_compiled' if self.compiled else ''}"


WORKS = (
    Work(REFERENCE),
    Work(OURS),
    Work(REFERENCE, "bfloat16"),
    Work(OURS, "bfloat16"),
    Work(OURS, "float32", "unseen"),
    Work(OURS, "bfloat16", "unseen"),
    Work(REFERENCE, "float32", "last"),
    Work(OURS, "float32", "last"),
    Work(OURS, "bfloat16", "last"),
)
COMPILED = tuple(replace(work, compiled=True) for work in WORKS if work.loss == "all")


def training(config: ThroughputConfig) -> list[Figure]:
    """All that is said of training: rates, with the allocator as users have it, which this process has; some, as the
    runner's workers have it; loss curves; memory and rates with a large catalogue."""
    found = timed(config, "training", WORKS + (COMPILED if config.compile else ()))
    found += in_worker_process(timed, config, "training_workers", tuple(w for w in WORKS if w.loss == "all"))
    return found + curves(config) + in_new_process(large_catalogue, config)


# -- rates -------------------------------------------------------------------------------------------------------


def timed(config: ThroughputConfig, job: str, works: tuple[Work, ...]) -> list[Figure]:
    """Tokens a second of these works, in turns, with dropout and without, and the share of the matrix peak."""
    torch.set_num_threads(1)
    batch, found, wait = batch_of(config), list[Figure](), waiting(config)
    steps: dict[str, Callable[[], object]] = {
        f"{PEAK} {name}": partial(_product, *_squares(config, name), wait) for name in PRECISIONS
    }
    with torch.random.fork_rng(devices=[]):
        for name, dropout in DROPOUTS.items():
            for work in works:
                steps[f"{work.who} {name}.{work.name}"] = step_of(config, work, dropout, batch, wait)
        timings = side_by_side(steps, config.repeats, config.seconds, clock_of(config))
    tokens = config.training_users * config.training_events
    peaks = {name: 2 * config.training_peak**3 / timings.pop(f"{PEAK} {name}").best for name in PRECISIONS}
    found += [Figure(PEAK, f"{job}.{name}.flops", value, _software()) for name, value in peaks.items()]
    for key, timing in timings.items():
        who, metric = key.split(" ", 1)
        found += _figures(config, f"{job}.{metric}", who, tokens, timing, peaks)
    return found


LARGE_REPEATS = 3
"""Of steps over a large catalogue at most: they take a second, a thousand times what a clock can tell."""


def large(config: ThroughputConfig) -> list[Figure]:
    """Steps over the large catalogue: by the reference, by ours over all titles, and over a sample of them."""
    torch.set_num_threads(1)
    batch, wait = batch_of(config, config.training_titles), waiting(config)
    sampling = SoftmaxConfig(kind="sampled", negatives=min(SoftmaxConfig.negatives, config.training_titles // 8))
    counts = torch.bincount(batch.titles.flatten().cpu(), minlength=config.training_titles)
    sampled = Softmax(sampling, config.training_titles, counts)
    steps: dict[str, Callable[[], object]] = {}
    with torch.random.fork_rng(devices=[]):
        for precision in PRECISIONS:
            ours, other = (model_of(config, 0.0, config.training_titles) for _ in range(2))
            theirs = reference_of(ours).train()
            by_name: dict[str, tuple[torch.nn.Module, Callable[[], Tensor]]] = {
                f"{REFERENCE} large.all_{precision}": (theirs, partial(theirs.loss, batch)),
                f"{OURS} large.all_{precision}": (ours, partial(same_loss, ours, batch)),
                f"{OURS} large.sampled_{precision}": (other, partial(imitation_loss, other, batch, softmax=sampled)),
            }
            for name, (model, loss) in by_name.items():
                steps[name] = stepping(config, model, loss, precision, wait)
        timings = side_by_side(steps, min(config.repeats, LARGE_REPEATS), config.seconds, clock_of(config))
    tokens, found = config.training_users * config.training_events, list[Figure]()
    for key, timing in timings.items():
        who, metric = key.split(" ", 1)
        found += [f._replace(software=_software()) for f in rates(f"training.{metric}", tokens, who, timing)]
    return found


def waiting(config: ThroughputConfig) -> Callable[[], None]:
    """What waits until the device has done all that it was told."""
    return torch.cuda.synchronize if config.device == "cuda" else lambda: None


def clock_of(config: ThroughputConfig) -> Callable[[], float]:
    """CPU time, or the wall's where a GPU works."""
    return time.perf_counter if config.device == "cuda" else time.process_time


def _figures(
    config: ThroughputConfig, metric: str, who: str, tokens: int, timing: Timing, peaks: dict[str, float]
) -> Iterator[Figure]:
    yield from (figure._replace(software=_software()) for figure in rates(metric, tokens, who, timing))
    if ".last_" not in metric:
        precision = next(name for name in PRECISIONS if name in metric)
        yield Figure(who, f"{metric}.peak_share", step_flops(config) / timing.best / peaks[precision], _software())


def step_flops(config: ThroughputConfig) -> float:
    """Of the products of a step: those of the forward pass, and twice as many backward.

    A layer's, for each of n = B·N tokens: 8d² to U, V, Q and K; 4Nd for scores and attended values, the ones after a
    row included, since all are worked out; 2d² of the output layer. The softmax's: 2dI. What is not a product counts
    as nothing.
    """
    n, d = config.training_users * config.training_events, config.training_dimensions
    layer = 8 * d * d + 4 * config.training_events * d + 2 * d * d
    return 3.0 * n * (TRAINED.n_layers * layer + 2 * d * config.n_titles)


def step_of(
    config: ThroughputConfig, work: Work, dropout: float, batch: Batch, wait: Callable[[], None]
) -> Callable[[], None]:
    """A training step of that kind, to be called again and again."""
    ours = model_of(config, dropout)
    model: HSTU | Reference = ours if work.who == OURS else reference_of(ours).train()
    if work.compiled:
        # each model's own way in, which the losses call
        name = "encode" if isinstance(model, HSTU) else "forward"
        setattr(model, name, torch.compile(getattr(model, name)))
    return stepping(config, model, partial(LOSSES[work.who, work.loss], model, batch), work.precision, wait)


def stepping(
    config: ThroughputConfig,
    model: torch.nn.Module,
    loss: Callable[[], Tensor],
    precision: str,
    wait: Callable[[], None],
) -> Callable[[], None]:
    """Forward, backward and optimiser, and a wait until the device is done."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(config.device, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss()
        value.backward()
        optimiser.step()
        wait()

    return step


TRAINED = HSTUConfig(n_layers=2, n_heads=2, scores=False)
"""What is trained, but for its width and length: without scores, which the research code's tokens lack here."""

RATE = 1e-3
"""The research code's learning rate; how fast a step is does not depend on it."""


def model_of(config: ThroughputConfig, dropout: float, n_titles: int | None = None) -> HSTU:
    """Ours, always with the same weights."""
    shape = replace(TRAINED, dimensions=config.training_dimensions, max_length=config.training_events, dropout=dropout)
    torch.manual_seed(derived_seed(config.seed, "backbone"))
    return HSTU(shape, n_titles or config.n_titles).train().to(config.device)


def batch_of(config: ThroughputConfig, n_titles: int | None = None) -> Batch:
    """Histories of a world, none of them shorter than the others."""
    return next(histories_of(config, config.training_users, n_titles).chunks(config.training_users)).to(config.device)


def histories_of(config: ThroughputConfig, n_users: int, n_titles: int | None = None) -> Histories:
    """Of so many users of the default world."""
    shape = WorldConfig(n_titles=n_titles or config.n_titles, history_length=config.training_events, seed=config.seed)
    return Histories(World(shape).generate_log(n_users))


def same_loss(model: HSTU, batch: Batch, softmax: Softmax | None = None) -> Tensor:
    """The reference's loss by our functions: mean cross-entropy over all titles, seen ones included."""
    states = prefix_states(model, batch).flatten(0, 1)
    rows = 0 if softmax is None else softmax.config.chunk_rows
    weights = states.new_full((len(states),), 1.0 / len(states))
    directions = model.title_directions()
    return weighted_cross_entropy(states, directions, batch.titles.flatten(), weights, chunk_rows=rows)


LOSSES: dict[tuple[str, str], Callable[..., Tensor]] = {
    (OURS, "all"): same_loss,
    (OURS, "unseen"): imitation_loss,
    (OURS, "last"): last_imitation_loss,
    (REFERENCE, "all"): Reference.loss,
    (REFERENCE, "last"): Reference.last_loss,
}


def _squares(config: ThroughputConfig, precision: str) -> tuple[Tensor, Tensor]:
    square = torch.ones(config.training_peak, config.training_peak, dtype=PRECISIONS[precision], device=config.device)
    return square, torch.empty_like(square)


def _product(square: Tensor, out: Tensor, wait: Callable[[], None]) -> None:
    torch.mm(square, square, out=out)
    wait()


def _software() -> str:
    return f"torch {torch.__version__}"


def large_catalogue(config: ThroughputConfig) -> list[Figure]:
    """Memory and rates, in this order: memory is measured in a process that has done nothing else."""
    return memory(config) + large(config)


# -- loss curves -------------------------------------------------------------------------------------------------

CURVE_USERS, HELD_OUT_USERS = 32, 4
"""Batches of users that a curve learns from, and is measured on."""


def curves(config: ThroughputConfig) -> list[Figure]:
    """The same training by the reference, by ours and by ours in bfloat16, without dropout: from the same weights, over
    the same batches. Differences of their losses step by step, and of their losses on held-out users at the end."""
    torch.set_num_threads(1)
    histories = histories_of(config, (CURVE_USERS + HELD_OUT_USERS) * config.training_users)
    cut = CURVE_USERS * config.training_users
    rows = torch.arange(len(histories))
    held_out = [histories.batch(part).to(config.device) for part in rows[cut:].split(config.training_users)]
    works = (Work(REFERENCE), Work(OURS), Work(OURS, "bfloat16"))
    with torch.random.fork_rng(devices=[]):
        ran = [_curve(config, work, histories, cut, held_out) for work in works]
    last = max(1, config.training_steps // 10)
    found = []
    for work, (losses, final) in zip(works, ran, strict=True):
        apart = max(abs(x - y) for x, y in zip(losses, ran[0][0], strict=True))
        values = {"held_out": final, "last_tenth": sum(losses[-last:]) / last, "most_apart": apart}
        found += [Figure(work.who, f"training.curve.{work.precision}.{k}", v, _software()) for k, v in values.items()]
    return found


def _curve(
    config: ThroughputConfig, work: Work, histories: Histories, cut: int, held_out: list[Batch]
) -> tuple[list[float], float]:
    """The loss of every step, and the mean loss of the held-out batches afterwards, in float32."""
    ours = model_of(config, 0.0)
    model: HSTU | Reference = ours if work.who == OURS else reference_of(ours).train()
    schedule = TrainingConfig(steps=config.training_steps)
    optimiser = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, fused=True)
    rng, losses = generator(config.seed, "batches of a curve"), []
    loss = LOSSES[work.who, "all"]
    for step in range(schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate(step)
        drawn = torch.from_numpy(rng.permutation(cut)[: config.training_users])
        batch = histories.batch(drawn).to(config.device)
        optimiser.zero_grad()
        with torch.autocast(config.device, torch.bfloat16, enabled=work.precision == "bfloat16"):
            value = loss(model, batch)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    with torch.no_grad():
        model.eval()
        return losses, sum(loss(model, batch).item() for batch in held_out) / len(held_out)


# -- memory ------------------------------------------------------------------------------------------------------


def memory(config: ThroughputConfig) -> list[Figure]:
    """The memory of a step, as a multiple of `logits_bytes`; the least first, lest a step uses what another left."""
    works = {
        "chunked": (OURS, 0, "float32"),
        "chunked_bfloat16": (OURS, 0, "bfloat16"),
        "at_once": (OURS, config.training_users * config.training_events, "float32"),
        "reference": (REFERENCE, 0, "float32"),
    }
    torch.set_num_threads(1)
    found = []
    few = replace(config, training_users=1, training_titles=config.training_events + 2)
    for who, chunk_rows, precision in works.values():
        step_bytes(few, who, chunk_rows, precision)  # what the first step of a process needs once, whatever its size
    for name, (who, chunk_rows, precision) in works.items():
        amount = step_bytes(config, who, chunk_rows, precision)
        found.append(Figure(who, f"training.memory.{name}", amount / logits_bytes(config), _software()))
    return found


def logits_bytes(config: ThroughputConfig) -> float:
    """Of one batch's logits in float32: B·N·I·4, with the large catalogue."""
    return 4.0 * config.training_users * config.training_events * config.training_titles


def step_bytes(config: ThroughputConfig, who: str, chunk_rows: int, precision: str) -> float:
    """The memory that one training step takes beyond what was held before it: model and batch.

    Args:
        who: `OURS` or `REFERENCE`.
        chunk_rows: rows whose logits exist at a time; 0 for the default.
        precision: of the products.
    """
    device = config.device
    batch, ours = batch_of(config, config.training_titles), model_of(config, 0.0, config.training_titles)
    model: Any = ours if who == OURS else reference_of(ours).train()
    softmax = Softmax(SoftmaxConfig(kind="full", chunk_rows=chunk_rows), config.training_titles)
    options = {"softmax": softmax} if who == OURS else {}
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = torch.cuda.memory_allocated() if device == "cuda" else held_bytes()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = LOSSES[who, "all"](model, batch, **options)
    loss.backward()
    optimiser.step()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    return after - before
