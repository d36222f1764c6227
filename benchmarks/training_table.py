"""The table of job ``training`` of suite ``throughput``."""

from dataclasses import dataclass

from recsim_gr.benchmarks.throughput_jobs import OURS, ThroughputConfig

REFERENCE, PEAK = "reference", "matrix peak"

Found = dict[tuple[str, str], tuple[float, str]]
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Line:
    """Ours beside the reference.

    Attributes:
        label: what it is.
        ours, theirs: metrics, without the job and ``.per_second``.
        target: of the ratio, at least; None where there is none.
    """

    label: str
    ours: str
    theirs: str
    target: float | None = None


def lines_of(dropout: str) -> list[Line]:
    """The lines with that dropout."""
    return [
        Line("float32, the identical loss", "all_float32", "all_float32", 1.15),
        Line("bfloat16, the same loss", "all_bfloat16", "all_float32", 2.0),
        Line("bfloat16, against the reference in bfloat16", "all_bfloat16", "all_bfloat16"),
        Line("float32, seen titles masked, as pretrained", "unseen_float32", "all_float32"),
        Line("bfloat16, seen titles masked, as pretrained", "unseen_bfloat16", "all_float32"),
        Line("last position, float32, against the reference's full step", "last_float32", "all_float32", 3.0),
        Line("last position, bfloat16, against the reference's full step", "last_bfloat16", "all_float32", 3.0),
        Line(
            "last position, float32, seen titles masked; the reference's loss there",
            "last_float32",
            "last_float32",
        ),
        Line(
            "last position, bfloat16, seen titles masked; the reference's loss there",
            "last_bfloat16",
            "last_float32",
        ),
        Line("float32, both compiled", "all_float32_compiled", "all_float32_compiled"),
        Line("bfloat16, compiled, against the reference as it is", "all_bfloat16_compiled", "all_float32"),
    ]


LARGE = (
    Line("float32, all titles", "all_float32", "all_float32"),
    Line("bfloat16, all titles", "all_bfloat16", "all_float32"),
    Line("float32, a sample, seen titles masked", "sampled_float32", "all_float32"),
    Line("bfloat16, a sample, seen titles masked", "sampled_bfloat16", "all_float32"),
)
"""With the large catalogue."""

MOST_MEMORY = 1.5
"""Multiples of one batch's logits."""
MOST_APART = 0.01
"""Nats, between held-out losses in float32 and in bfloat16."""

NOTES = (
    "Training: the reference is a direct PyTorch transcription of the structure of the public HSTU research code",
    "(recsim_gr/benchmarks/hstu_reference.py), with our weights, batches and optimiser. A step is forward, backward",
    "and optimiser. 'of peak' counts the multiplications and additions of a step's products, three times those of its",
    "forward pass, against a large product in the same run and precision. Memory is of a step beyond model and batch,",
    "as a multiple of B x N x I float32 logits. Learned at the last position, a step still reads B x N tokens.",
)

TITLES = {
    "training": "the allocator as users have it",
    "training_workers": "the allocator as the runner's workers have it",
}
DROPOUTS = {"dropout": "dropout .2", "plain": "dropout off"}
HEADER = ("", "target", "ours", "median", "reference", "ours/reference", "of peak", "verdict")


def training_table(found: Found, config: ThroughputConfig) -> Rows:
    """Rows, the header first; none where nothing was measured."""
    if not any(metric.startswith("training") for _, metric in found):
        return []
    shape = (
        f"training, {config.training_users} x {config.training_events} tokens, d = {config.training_dimensions}, "
        f"{config.n_titles:,} titles, on {config.device}"
    )
    rows: Rows = [(shape, *HEADER[1:])]
    for job, allocator in TITLES.items():
        for dropout, said in DROPOUTS.items():
            rows.append((f"{said}; {allocator}", *[""] * (len(HEADER) - 1)))
            rows += [row for line in lines_of(dropout) if (row := _row(found, line, f"{job}.{dropout}")) is not None]
    rows.append((f"{config.training_titles:,} titles, dropout off", *[""] * (len(HEADER) - 1)))
    rows += [row for line in LARGE if (row := _row(found, line, "training.large")) is not None]
    return [*rows, *_peak_rows(found, config), *_curve_rows(found, config), *_memory_rows(found, config)]


def _row(found: Found, line: Line, prefix: str) -> tuple[str, ...] | None:
    key = f"{prefix}.{line.ours}"
    if (OURS, f"{key}.per_second") not in found:
        return None
    ours, theirs = (
        _value(found, OURS, f"{key}.per_second"),
        _value(found, REFERENCE, f"{prefix}.{line.theirs}.per_second"),
    )
    share = _value(found, OURS, f"{key}.peak_share")
    return (
        f"  {line.label}",
        "" if line.target is None else f">= {line.target:g}",
        f"{ours / 1e3:.1f} k tokens/s",
        f"{_value(found, OURS, f'{key}.per_second_median') / 1e3:.1f} k",
        f"{theirs / 1e3:.1f} k",
        f"{ours / theirs:.2f}",
        "" if share != share else f"{100 * share:.0f} %",
        _verdict(ours / theirs, line.target, at_least=True),
    )


def _peak_rows(found: Found, config: ThroughputConfig) -> Rows:
    rows: Rows = []
    for precision in ("float32", "bfloat16"):
        peak = _value(found, PEAK, f"training.{precision}.flops")
        theirs = _value(found, REFERENCE, f"training.plain.all_{precision}.peak_share")
        label = f"a product of {config.training_peak:,} x {config.training_peak:,} matrices, {precision} (the peak)"
        rows.append((label, "", f"{peak / 1e9:.0f} GFLOP/s", "", "", "", f"reference {100 * theirs:.0f} %", ""))
    return rows


def _curve_rows(found: Found, config: ThroughputConfig) -> Rows:
    theirs = _value(found, REFERENCE, "training.curve.float32.held_out")
    rows: Rows = []
    for precision, target in (("float32", None), ("bfloat16", MOST_APART)):
        ours = _value(found, OURS, f"training.curve.{precision}.held_out")
        most = _value(found, OURS, f"training.curve.{precision}.most_apart")
        label = f"held-out loss after {config.training_steps} steps, {precision} (losses at most {most:.2g} apart)"
        bound = "" if target is None else f"within {target:g}"
        verdict = _verdict(abs(ours - theirs), target, at_least=False)
        rows.append((label, bound, f"{ours:.4f} nats", "", f"{theirs:.4f}", f"{ours - theirs:+.4f}", "", verdict))
    return rows


def _memory_rows(found: Found, config: ThroughputConfig) -> Rows:
    labels = {
        "at_once": ("all rows at once", MOST_MEMORY),
        "chunked": ("in chunks", MOST_MEMORY),
        "chunked_bfloat16": ("in chunks, bfloat16", MOST_MEMORY),
    }
    theirs = _value(found, REFERENCE, "training.memory.reference")
    rows: Rows = []
    for name, (label, most) in labels.items():
        ours = _value(found, OURS, f"training.memory.{name}")
        rows.append(
            (
                f"memory of a step over {config.training_titles:,} titles, {label}",
                f"<= {most:g}",
                f"{ours:.2f} logits",
                "",
                f"{theirs:.2f}",
                f"{ours / theirs:.2f}" if theirs else "",
                "",
                _verdict(ours, most, at_least=False),
            )
        )
    return rows


def _verdict(value: float, target: float | None, *, at_least: bool) -> str:
    if target is None:
        return ""
    if value != value:
        return "not measured"
    return "pass" if (value >= target if at_least else value <= target) else "SHORT"


def _value(found: Found, who: str, metric: str) -> float:
    return found.get((who, metric), (float("nan"), ""))[0]
