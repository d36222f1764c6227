"""Suite ``headroom``: what lacks to `Oracle`, split into what no observation tells and what was not learned."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import altair as alt
import numpy as np
import torch

from recsim_gr.agents import AGENTS
from recsim_gr.bayes import BayesReference
from recsim_gr.bayes_sampler import BayesConfig
from recsim_gr.benchmarks.charts import Drawing, Figure, finished
from recsim_gr.benchmarks.laboratory import Laboratory
from recsim_gr.benchmarks.landscape import EVALUATION_SECONDS, Landscape, LandscapeConfig
from recsim_gr.benchmarks.report import read_results, write_figure
from recsim_gr.benchmarks.statistics import WORLD, FloatArray, Results, t_interval
from recsim_gr.benchmarks.suite import Notify, register
from recsim_gr.configs import require
from recsim_gr.errors import ConfigError, RunDirectoryError
from recsim_gr.files import read_json, write_text
from recsim_gr.rewards import RewardEnsemble
from recsim_gr.world import World

VALUE = "value_top10"

BAYES = "bayes_"
"""Before the names of the reference's figures, which stand among the world's own."""

SECONDS_PER_CONTEXT = 0.25
"""Of the inference, for the estimate of ``--dry-run`` only."""


@dataclass(frozen=True, kw_only=True)
class HeadroomConfig(LandscapeConfig):
    """The landscape's simulated worlds, with the Bayes reference in each."""

    agents: tuple[str, ...] = ("Pretrained", "BC", "RewardWeightedBC", "ASFT", "CQL", "Oracle")
    """The learners whose share is asked for; `Pretrained` is the backbone, whose likelihood has the floor beside it."""
    test_contexts: int = 200
    """A tenth of the landscape's, since each is a fifth of a second of inference; differences are paired."""
    bayes: BayesConfig = field(default_factory=BayesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world != "simulated":
            raise ConfigError("suite headroom needs simulated worlds: real users have no law to infer them by")
        require("Pretrained" in self.agents, self, "agents", "a list with Pretrained in it, the backbone")


@register
class Headroom(Landscape):
    """Cells are the landscape's; beside the agents stands what the best use of their observations is worth."""

    name = "headroom"
    presets: ClassVar[dict[str, Any]] = {
        "quick": HeadroomConfig(),
        "smoke": HeadroomConfig(
            **{
                name: getattr(Landscape.presets["smoke"], name)
                for name in Landscape.presets["smoke"].__dataclass_fields__
                if name != "agents"
            },
            bayes=BayesConfig(particles=64, final_moves=2),
        ),
    }
    config: HeadroomConfig

    def estimate_cell_seconds(self) -> float:
        return super().estimate_cell_seconds() + SECONDS_PER_CONTEXT * self.config.test_contexts + EVALUATION_SECONDS

    def laboratory(self, noise: float, seed: int, notify: Notify) -> Laboratory:
        return _Laboratory(self.config, noise, seed, notify)

    def report(self, run_dir: Path) -> tuple[Path, list[str]]:
        lines = []
        for k, (name, results) in enumerate(read_results(run_dir / "results.parquet").items()):
            file = "headroom" + (f"-{k + 1}" if k else "")
            write_figure(run_dir / "figures", file, figure(results, _subtitle(run_dir, name, results)))
            lines += summary(results)
        page = run_dir / "headroom.txt"
        write_text(page, "\n".join(lines) + "\n")
        return page, lines


class _Laboratory(Laboratory):
    """Without a judge, which no figure here needs, and with the reference."""

    config: HeadroomConfig

    def fit_judge(self) -> RewardEnsemble | None:
        return None

    @torch.no_grad()
    def world_figures(self) -> dict[str, float]:
        assert isinstance(self.world, World)
        reference = BayesReference(self.world, self.config.bayes)
        figures = self.examination.evaluate(reference).metrics
        diagnostics = reference.posterior(self.contexts.observations).diagnostics  # kept from the evaluation
        figures["standard_error"] = float(np.sqrt((diagnostics.standard_error**2).mean()))
        figures["effective_size"] = float(diagnostics.effective_size.mean())
        return super().world_figures() | {BAYES + name: value for name, value in figures.items()}


# -------------------------------------------------------------------------------------------------------------- result


def parts(results: Results) -> tuple[FloatArray, dict[str, FloatArray]]:
    """(N, S) unobservable, and agent to (N, S) unlearned: the two add up to the distance to `Oracle`.

    Raises:
        RunDirectoryError: the table is not this suite's.
    """
    best, bayes = results.of("Oracle", VALUE), results.of(WORLD, BAYES + VALUE)
    if not np.isfinite(best - bayes).any():
        raise RunDirectoryError(
            "the results hold no value of Oracle and Bayes on the same contexts; run the suite again"
        )
    agents = [name for name in results.agents if not (name in AGENTS and AGENTS[name].referee)]
    return best - bayes, {name: bayes - results.of(name, VALUE) for name in agents}


def summary(results: Results) -> list[str]:
    """A block of lines a noise level, and what must hold."""
    unobservable, unlearned = parts(results)
    lines = []
    for level, noise in enumerate(results.noise):
        oracle, bayes = (_mean(results.of(*key)[level]) for key in (("Oracle", VALUE), (WORLD, BAYES + VALUE)))
        lines.append(
            f"dial {noise:g} (reliability {results.reliability[level]:.2f}): Oracle {oracle:.3f}, Bayes {bayes:.3f}: "
            f"unobservable {_said(unobservable[level])}"
        )
        shown = sorted(unlearned, key=lambda name: _mean(unlearned[name][level]))
        lines.append("  unlearned: " + ", ".join(f"{name} {_said(unlearned[name][level])}" for name in shown))
        floor, entropy = (results.of(WORLD, BAYES + name)[level] for name in ("nll", "entropy"))
        backbone = results.of("Pretrained", "nll")[level]
        lines.append(
            f"  next title, nats: floor {_mean(floor):.3f}, backbone {_mean(backbone):.3f}: short by "
            f"{_said(backbone - floor)}; the floor's own entropy {_mean(entropy):.3f}"
        )
    margins = {name: _mean(difference.mean(axis=0)) for name, difference in unlearned.items()}
    closest = min(margins, key=lambda name: margins[name])
    verdict = "holds" if margins[closest] >= 0 and _mean(unobservable.mean(axis=0)) >= 0 else "FAILS"
    lines.append(f"{verdict}: over all worlds no agent beats Bayes (closest {closest}, {margins[closest]:+.3f})")
    return lines


def figure(results: Results, subtitle: str) -> Figure:
    """A stacked bar an agent and noise level: the distance to `Oracle` in its two parts."""
    unobservable, unlearned = parts(results)
    rows = []
    for level, noise in enumerate(results.noise):
        reliability = results.reliability[level]
        where = f"ν = {noise:g}" + (f", reliability {reliability:z.2f}" if np.isfinite(reliability) else "")
        lost = _mean(unobservable[level])
        for agent, difference in unlearned.items():
            gap = _mean(difference[level])
            place = {"agent": agent, "where": where, "level": level}
            rows.append({**place, "part": PARTS[0], "start": 0.0, "end": lost, "points": lost})
            rows.append({**place, "part": PARTS[1], "start": lost, "end": lost + gap, "points": gap})
    order = sorted(unlearned, key=lambda name: -_mean(unlearned[name].mean(axis=0)))
    chart = (
        alt.Chart(alt.NamedData(name="parts"))
        .mark_bar(height=13)
        .encode(
            x=alt.X("start:Q", title="true top-10 value below Oracle, in points (0: knows the user)"),
            x2="end:Q",
            y=alt.Y("agent:N", sort=order, title=None),
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=list(PARTS), range=["#bdbdbd", "#d55e00"]),
                legend=alt.Legend(title=None, orient="top", labelLimit=500),
            ),
            order=alt.Order("start:Q"),
            tooltip=["agent:N", "part:N", alt.Tooltip("points:Q", format=".3f")],
        )
        .properties(width=640, height=20 * len(unlearned))
        .facet(
            row=alt.Row(
                "where:N",
                sort=list(dict.fromkeys(str(row["where"]) for row in rows)),
                title=None,
                header=alt.Header(labelAngle=0, labelAlign="left", labelOrient="top", labelAnchor="start"),
            ),
            spacing=8,
        )
    )
    title = "Headroom: what no observation tells, and what was not learned"
    return Figure("headroom", title, finished(Drawing(chart, {"parts": rows}), title, subtitle))


PARTS = ("unobservable: Oracle − Bayes, whatever the algorithm", "unlearned: Bayes − agent")


def _subtitle(run_dir: Path, world: str, results: Results) -> str:
    n = len(results.seeds)
    contexts = read_json(run_dir / "config.json").get("test_contexts", "?")
    noise = world.split(" · ")[-1]
    return f"{noise} noise · {contexts} contexts a world · " + (f"mean over {n} seeds" if n > 1 else "one seed")


def _mean(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _said(values: FloatArray) -> str:
    """A mean over seeds, with its interval where there is one."""
    mean, half = (float(x) for x in t_interval(values)[:2])
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")
