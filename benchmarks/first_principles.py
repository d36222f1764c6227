"""What must hold whatever the ranking between algorithms; if one of these fails, look for a bug first."""

import numpy as np

from recsim_gr.agents import AGENTS
from recsim_gr.benchmarks.statistics import Results, holm, place, t_test

TOLERANCE = 1e-9
"""Of a comparison between two averages of the same numbers in another order."""

LEARNERS_AT_NO_NOISE = ("PPO", "CQL", "ASFT")
LEAST_PLACE = 0.1
"""At dial 0 each of these must go a tenth of the way from `BC` to `Oracle`, on every seed."""

SEEDS_FOR_A_CLAIM = 10
"""Seeds from which the claim at dial 1 is tested."""

LEVEL = 0.05


def check_first_principles(results: Results, simulated: bool, noise_model: str) -> list[str]:
    """One line a claim, each beginning with ``holds``, ``FAILS`` or ``open`` (not enough to tell).

    Args:
        results: of one world.
        simulated: whether it is a simulated one; how much is to be learned on real ratings is not known beforehand.
        noise_model: only ``watch_time`` carries nothing at dial 1; unbiased noise of finite size always carries some.
    """
    if not simulated:
        return ceilings(results)
    return [*ceilings(results), *no_noise(results), *(only_noise(results) if noise_model == "watch_time" else ())]


def ceilings(results: Results) -> list[str]:
    """`Oracle` first in true value, `ScoreOracle` first in score value, everywhere."""
    lines = []
    for ceiling, metrics in (
        ("Oracle", ("value_sampled", "value_greedy", "value_top10")),
        ("ScoreOracle", ("score_value_sampled", "score_value_greedy", "score_value_top10")),
    ):
        margins = [
            results.of(ceiling, metric) - results.of(agent, metric)
            for metric in metrics
            for agent in results.agents
            if agent != ceiling
        ]
        if not np.isfinite(margins).any():
            lines.append(f"open: {ceiling} or its metrics are not in the results")
            continue
        least = float(np.nanmin(np.stack(margins)))
        verdict = "holds" if least >= -TOLERANCE else "FAILS"
        what = "score value" if ceiling == "ScoreOracle" else "true value"
        lines.append(f"{verdict}: {ceiling} is first in {what} everywhere (least margin {least:+.4f})")
    return lines


def no_noise(results: Results) -> list[str]:
    """At dial 0 the learners from rewards go a tenth of the way from `BC` to `Oracle`, on every seed."""
    if results.noise[0] != 0.0:
        return ["open: no cell at dial 0"]
    lines = []
    for agent in LEARNERS_AT_NO_NOISE:
        if agent not in results.agents:
            continue
        metric = "value_top10"
        shares = place(*(results.of(a, metric)[0] for a in (agent, "BC", "Oracle")))
        if not np.isfinite(shares).any():
            lines.append(f"open: no place of {agent} at dial 0")
            continue
        least = float(np.nanmin(shares))
        verdict = "holds" if least >= LEAST_PLACE else "FAILS"
        lines.append(
            f"{verdict}: at dial 0 {agent} goes at least {LEAST_PLACE:.0%} of the way from BC to Oracle "
            f"on every seed (least {least:.1%} of {np.isfinite(shares).sum()})"
        )
    return lines


def only_noise(results: Results) -> list[str]:
    """At dial 1 of a noise that carries nothing, no agent that uses rewards is better than `BC`."""
    if results.noise[-1] != 1.0:
        return ["open: no cell at dial 1"]
    agents = [name for name in results.agents if name in AGENTS and learns_from_rewards(name)]
    base = results.of("BC", "value_top10")[-1]
    differences = {agent: results.of(agent, "value_top10")[-1] - base for agent in agents}
    seeds = min((int(np.isfinite(d).sum()) for d in differences.values()), default=0)
    if seeds < SEEDS_FOR_A_CLAIM:
        return [f"open: at dial 1, {seeds} seeds; {SEEDS_FOR_A_CLAIM} are needed to say whether any beats BC"]
    adjusted = holm([float(t_test(d)[1]) for d in differences.values()])
    smallest = int(np.argmin(adjusted))
    agent = agents[smallest]
    verdict = "holds" if adjusted[smallest] > LEVEL else "FAILS"
    return [
        f"{verdict}: at dial 1 no agent that uses rewards beats BC (smallest Holm-adjusted one-sided p: "
        f"{adjusted[smallest]:.3f}, {agent}, mean difference {np.nanmean(differences[agent]):+.4f}, {seeds} seeds)"
    ]


def learns_from_rewards(name: str) -> bool:
    """Whether a registered agent is a competitor that uses scores."""
    kind = AGENTS[name]
    return kind.uses_rewards and not (kind.referee or kind.informed)
