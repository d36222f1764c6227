"""The study's statements about its Table 2, each worked out from the rows: does it hold, at which noise, how surely.

A statement about an agent is a conjunction of parts, each a paired difference that should be above 0 ("better than this
one, and than that one"). It is shown where every part is above 0 by a one-sided Student-t test over seeds, so its p is
the largest of theirs (intersection-union: Berger 1982). It is refuted where some part is below 0, so that p is the
smallest of theirs times their number (Bonferroni). Both are then corrected by Holm over all agents and noise levels of
a statement. What is neither shown nor refuted has a direction, that of the means, and is called undecided.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recsim_gr.benchmarks.offline_choices import DEFAULT
from recsim_gr.benchmarks.offline_trials import REFERENCE, Trials, whole_family
from recsim_gr.benchmarks.statistics import ROBUST_SEEDS, FloatArray, t_interval, t_test

SIGNIFICANT = 0.05

OURS, Q = "ASFT", "CQL"
CLIMBERS = ("PPO", "RSDPO", "RSIPO")
"""PPO, and DPO and IPO on sampled pairs, as the study has them."""

IN_THE_STUDY = (REFERENCE, "BC", Q, *CLIMBERS)
"""Beside A-SFT."""

OFFLINE, JUDGE, SCORE, SATISFACTION, HEADLINE = (
    "ndcg10",
    "judge_return",
    "score_return",
    "value_return",
    "value_top10",
)


class Part(NamedTuple):
    """One difference of a conjunction: what it is, and (N, S) what should be above 0."""

    title: str
    differences: FloatArray


@dataclass(frozen=True)
class Statement:
    """What is claimed, and how it is told.

    Attributes:
        claim: in the study's words, or a reading of them.
        seen: whether a practitioner sees it too, or only who knows the truth.
        meaning: what is tested.
        agents: of whom it is said.
        parts: (trials, rule, agent) to the conjunction; empty where agents are missing.
        against: the agents that the claim compares with.
    """

    claim: str
    seen: bool
    meaning: str
    agents: Callable[[Trials], Sequence[str]]
    parts: Callable[[Trials, str, str], list[Part]]
    against: Sequence[str] = ()

    def unasked(self, trials: Trials) -> list[str]:
        """Agents that the claim names and the run leaves out."""
        return [name for name in self.against if not trials.asked(name)]


def _others(trials: Trials, names: Sequence[str], agent: str) -> list[str]:
    """Those that take part; one that has no result leaves a comparison without one, and so the verdict."""
    return [other for other in names if trials.asked(other) and other != agent]


def _better(metric: str, than: Callable[[Trials], Sequence[str]]) -> Callable[[Trials, str, str], list[Part]]:
    """Above each of the others on a metric."""

    def parts(trials: Trials, rule: str, agent: str) -> list[Part]:
        own = trials.of(agent, rule, metric)
        others = _others(trials, than(trials), agent)
        return [Part(f"above {other}", own - trials.of(other, rule, metric)) for other in others]

    return parts


def _gain(trials: Trials, rule: str, agent: str, metric: str) -> FloatArray:
    """Over the reference at its default, as Table 2's percentages are."""
    return trials.of(agent, rule, metric) - trials.of(REFERENCE, DEFAULT, metric)


def _climbs_but(title: str, loss: Callable[[Trials, str, str], FloatArray]) -> Callable[..., list[Part]]:
    """A good score by the judge, and a loss that should be above 0."""

    def parts(trials: Trials, rule: str, agent: str) -> list[Part]:
        judged = Part("judge's gain", _gain(trials, rule, agent, JUDGE))
        return [judged, Part(title, loss(trials, rule, agent))]

    return parts


def _promise(trials: Trials, rule: str, agent: str) -> FloatArray:
    """How much more of the judge's gain is promised than the true expected score gains, over the same steps."""
    return _gain(trials, rule, agent, JUDGE) - _gain(trials, rule, agent, SCORE)


def _keeps_its_promise(trials: Trials, rule: str, agent: str) -> list[Part]:
    others = _others(trials, CLIMBERS, agent)
    own = _promise(trials, rule, agent)
    return [Part(f"less than {other}", _promise(trials, rule, other) - own) for other in others]


def _ours(metric: str, over: str) -> Callable[[Trials, str, str], list[Part]]:
    def parts(trials: Trials, rule: str, agent: str) -> list[Part]:
        if not trials.asked(OURS):
            return []
        return [Part(over, trials.of(OURS, rule, metric) - trials.of(agent, rule, metric))]

    return parts


def _only(*names: str) -> Callable[[Trials], Sequence[str]]:
    return lambda trials: [name for name in names if trials.asked(name)]


def _in_the_study(trials: Trials) -> Sequence[str]:
    return IN_THE_STUDY


def _all(trials: Trials) -> Sequence[str]:
    return (*trials.competitors, *trials.failed_competitors)


STATEMENTS: Mapping[str, tuple[Statement, ...]] = {
    "A-SFT improves most": (
        Statement(
            "A-SFT improves the ranking of logged titles most", True,
            "NDCG@10 on users of high score, above each of the study's others here", _only(OURS),
            _better(OFFLINE, _in_the_study), IN_THE_STUDY,
        ),
        Statement(
            "A-SFT improves the judge's score most", True,
            "judge's return, above each of the study's others here", _only(OURS), _better(JUDGE, _in_the_study),
            IN_THE_STUDY,
        ),
        Statement(
            "A-SFT improves satisfaction most", False,
            "true top-10 value, above each of the study's others here", _only(OURS), _better(HEADLINE, _in_the_study),
            IN_THE_STUDY,
        ),
        Statement(
            "A-SFT improves satisfaction most, of all agents here", False,
            "true top-10 value, above every competitor of this run", _only(OURS), _better(HEADLINE, _all),
        ),
    ),
    "PPO, DPO and IPO reach a good judge score but overfit": (
        Statement(
            "PPO, DPO, IPO: a good judge score, and a worse ranking of logged titles", True,
            f"judge's return above {REFERENCE}'s, NDCG@10 below it", _only(*CLIMBERS),
            _climbs_but("NDCG@10 lost", lambda t, rule, agent: -_gain(t, rule, agent, OFFLINE)),
        ),
        Statement(
            "PPO, DPO, IPO: a good judge score that is not kept", False,
            f"judge's return above {REFERENCE}'s, by more than the true expected score of the same steps is",
            _only(*CLIMBERS), _climbs_but("promised, not scored", _promise),
        ),
        Statement(
            "PPO, DPO, IPO: a good judge score, and less satisfied users", False,
            f"judge's return above {REFERENCE}'s, true satisfaction of the same steps below it", _only(*CLIMBERS),
            _climbs_but("satisfaction lost", lambda t, rule, agent: -_gain(t, rule, agent, SATISFACTION)),
        ),
    ),
    "CQL is more robust but leaves signal unused": (
        Statement(
            "CQL keeps a better ranking of logged titles than PPO, DPO and IPO", True,
            "NDCG@10 above each of theirs", _only(Q), _better(OFFLINE, lambda trials: CLIMBERS), CLIMBERS,
        ),
        Statement(
            "CQL promises less that is not kept", False,
            "judge's gain beyond the true expected score's, below each of theirs", _only(Q), _keeps_its_promise,
            CLIMBERS,
        ),
        Statement(
            "CQL leaves judge's score that A-SFT finds", True,
            "A-SFT's judge's return above CQL's", _only(Q), _ours(JUDGE, "left to A-SFT"),
        ),
        Statement(
            "CQL leaves satisfaction that A-SFT finds", False,
            "A-SFT's true top-10 value above CQL's", _only(Q), _ours(HEADLINE, "left to A-SFT"),
        ),
    ),
}  # fmt: skip
"""What the study says of its Table 2, and what of it can be asked of rows."""


# ---------------------------------------------------------------------------------------------------------- testing

HOLDS, SEEMS, OTHERWISE, FAILS, UNTESTED, MISSING = range(6)
WORDS = (
    "holds",
    "undecided, leans to yes",
    "undecided, leans to no",
    "does not hold",
    "one seed, so no test",
    "no result",
)


class Verdict(NamedTuple):
    """What the rows say of a statement about one agent at one noise level.

    Attributes:
        agent, level: of whom, and where.
        word: an index of `WORDS`.
        p_holds, p_fails: of the statement and of its contrary, after Holm's correction.
        parts: title, mean and half of the 95 % interval of each part, one without a result first, then the lowest mean.
        n_seeds: that the part with fewest has.
    """

    agent: str
    level: int
    word: int
    p_holds: float
    p_fails: float
    parts: tuple[tuple[str, float, float], ...]
    n_seeds: int


def verdicts(statement: Statement, trials: Trials, rule: str) -> list[Verdict]:
    """Of every agent that the statement is about, at every noise level."""
    cases = []
    for agent in statement.agents(trials):
        parts = statement.parts(trials, rule, agent)
        levels = range(len(trials.noise)) if parts else ()
        cases += [(agent, level, [part.differences[level] for part in parts], parts) for level in levels]
    tested = [_conjunction(differences) for _, _, differences, _ in cases]
    p_holds, p_fails = (whole_family(np.array([p[k] for p in tested])) for k in (0, 1))
    return [
        Verdict(
            agent,
            level,
            _word(holds, fails, differences),
            holds,
            fails,
            _shown(parts, level),
            min(int(np.isfinite(values).sum()) for values in differences),
        )
        for (agent, level, differences, parts), holds, fails in zip(
            cases, p_holds.tolist(), p_fails.tolist(), strict=True
        )
    ]


def _conjunction(differences: Sequence[FloatArray]) -> tuple[float, float]:
    """p of "all above 0", and of "some below 0"."""
    above = [float(t_test(values)[1]) for values in differences]
    below = [float(t_test(-values)[1]) for values in differences]
    return float(np.max(above)), float(np.minimum(1.0, len(below) * np.min(below)))


def _word(holds: float, fails: float, differences: Sequence[FloatArray]) -> int:
    means = [float(t_interval(values)[0]) for values in differences]
    if not np.isfinite(means).all():
        return MISSING
    if not (np.isfinite(holds) and np.isfinite(fails)):
        return UNTESTED
    if holds <= SIGNIFICANT:
        return HOLDS
    if fails <= SIGNIFICANT:
        return FAILS
    return SEEMS if min(means) > 0 else OTHERWISE


def _shown(parts: Sequence[Part], level: int) -> tuple[tuple[str, float, float], ...]:
    found = []
    for part in parts:
        mean, half, _ = t_interval(part.differences[level])
        found.append((part.title, float(mean), float(half)))
    return tuple(sorted(found, key=lambda part: part[1] if np.isfinite(part[1]) else -np.inf))


# ---------------------------------------------------------------------------------------------------------- wording


def caution(trials: Trials) -> str:
    """How far the seeds carry, in one sentence."""
    n = len(trials.seeds)
    if n == 1:
        return "One seed: nothing here is tested, and every direction may be the luck of one world."
    if n < ROBUST_SEEDS:
        return (
            f"{n} seeds are a first reading and no claim, whatever a test says: {ROBUST_SEEDS} or more make one. "
            "Undecided means that the seeds cannot tell, not that there is no difference."
        )
    return f"{n} seeds. Undecided means that they cannot tell, not that there is no difference."


def said(word: int, n_seeds: int) -> str:
    """A verdict in words; with few seeds a test that passes says so only of them."""
    few = word in (HOLDS, FAILS) and n_seeds < ROBUST_SEEDS
    return f"{WORDS[word]} ({n_seeds} seeds)" if few else WORDS[word]


def sentence(statement: Statement, found: Sequence[Verdict], trials: Trials) -> str:
    """Where a statement holds, where it does not, and where nobody can say; agent by agent."""
    who = "seen by the study's own measures" if statement.seen else "in truth"
    if not found:
        return f"{statement.claim} ({who}): not asked, agents are missing"
    told = []
    for agent in dict.fromkeys(verdict.agent for verdict in found):
        own = [verdict for verdict in found if verdict.agent == agent]
        parts = []
        for word in range(len(WORDS)):
            levels = [verdict.level for verdict in own if verdict.word == word]
            if levels:
                n_seeds = min(verdict.n_seeds for verdict in own if verdict.word == word)
                parts.append(f"{said(word, n_seeds)} at {_at(levels, trials)}")
        told.append(f"{agent} {'; '.join(parts)}")
    unasked = statement.unasked(trials)
    left_out = f". Not asked against {', '.join(unasked)}, which the run leaves out" if unasked else ""
    return f"{statement.claim} ({who}): " + ". ".join(told) + left_out


def _at(levels: Sequence[int], trials: Trials) -> str:
    if len(levels) == len(trials.noise) > 1:
        return f"all {len(levels)} noise levels"
    return ", ".join(level_name(trials, level) for level in levels)


def level_name(trials: Trials, level: int) -> str:
    """A noise level with its reliability."""
    reliability = trials.reliability[level]
    known = f" (reliability {reliability:z.2f})" if np.isfinite(reliability) else ""
    return f"ν {trials.noise[level]:g}{known}"


def readings(trials: Trials, rule: str) -> list[str]:
    """Every statement's sentence, under the caution that the seeds ask for; of one seed that alone."""
    lines = [caution(trials)]
    if len(trials.seeds) == 1:
        return lines
    for statements in STATEMENTS.values():
        lines += [sentence(s, verdicts(s, trials, rule), trials) for s in statements]
    return lines
