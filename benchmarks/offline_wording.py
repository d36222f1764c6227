"""The words of Table 2's page: headings and notes."""

from recsim_gr.benchmarks.offline_trials import REFERENCE

STUDY = {"ndcg10": "NDCG@10", "hr10": "HR@10", "mrr": "MRR", "judge_return": "judge"}
"""What the study measures."""

TWINS = {
    "ndcg10": ("ndcg10_true",),
    "hr10": ("hr10_true",),
    "mrr": ("mrr_true",),
    "judge_return": ("score_return", "value_return"),
}
"""The true counterparts of each, which the study could not know."""

TWIN_HEADINGS = {
    "ndcg10_true": "satisfied users",
    "hr10_true": "satisfied users",
    "mrr_true": "satisfied users",
    "score_return": "true expected score",
    "value_return": "true satisfaction",
}
HEADLINE = "value_top10"
DEVIATION = "judge_return_sd"

FIGURES_THEMSELVES = {
    "value_top10": "top-10 value",
    "ndcg10": "NDCG@10",
    "ndcg10_true": "true twin",
    "hr10": "HR@10",
    "hr10_true": "true twin",
    "mrr": "MRR",
    "mrr_true": "true twin",
    "judge_return": "judge",
    "score_return": "expected score",
    "value_return": "satisfaction",
    "kl_ref": "KL",
    "entropy": "entropy",
    "validation_snips": "SNIPS",
    "validation_snips_target": "what SNIPS estimates",
    "validation_snips_share": "share of the log that tells",
}
"""Of the table of means: metric to heading."""

HOW = f"""The study reports its algorithms as percentages over {REFERENCE} on users whose mean observed score is above
the median: how high the title that they really took next is ranked (NDCG@10, HR@10, MRR), in a later epoch, and what
a reward model trained on other users gives three discounted steps. In italics beside each, what no study of a log can
know: the same metrics on users whose <i>satisfaction</i> is above the median; the expected score and the satisfaction
of the same three steps in the true world; and the satisfaction of the ten titles ranked first, this project's
headline. Percentages are of the figures as they are, scores on a scale from 1 to 5, and are paired: the same world,
users and batches. ± is half of a 95 % Student-t interval over seeds; p is two-sided, corrected by Holm over the
competitors of a noise level, but over neither levels nor columns: bold where it is at most 5 %, and told where the
pointer rests. Grey agents know what no log holds, or are not trained: references, no competitors."""

DEVIATION_NOTE = """Deviation: of the judge's score in percent of it, over the users of a world (mean over worlds), and
below it over the seeds, of a world's mean. The study reports one below 4 %; over what, is not known here."""

PROMISE_NOTE = f"""Across: the judge's gain over {REFERENCE}. Up: the true gain over the same steps. On the diagonal of
the first row the judge keeps its promise; below it, it promises what the titles do not score. Below the dashed line of
the second row users are less satisfied than with {REFERENCE}'s titles. (Scores are compressed by noise, so that a gain
in satisfaction may well be above the diagonal.) Points too far outside are named above the picture."""

SELECTION = """Each competitor that has a strength was fitted at five values of it, and a rule took one of them by what
validation users show, world by world: users of the epochs of the log, of whom no test user is one. Lost: true top-10
value of the best of the five in hindsight, on test users, less that of the one taken. ⚑: how many of the choices are
the weakest or the strongest that was tried, so that the best may lie beyond. The judge that chooses is the judge of the
table. The best in hindsight is picked by the very figures of test users by which it is measured, luck of its training
included: of five equal strengths a choice would lose something too. So rules are to be read against each other and
against the truth on validation users, not against 0. The default may lie outside the five, and then be worth more.
Where scores pile up at 5 (watch_time noise), several fractions of FilteredBC keep the same events, and several targets
of ConditionedBC ask for the same score: their five trials are then two or three."""

REGRET_NOTE = """Right is worse: on test users, true top-10 value of an agent's best strength less that of the one that
a rule took, mean over worlds. Black circles are the strength that the agent comes with."""

REGIONS_NOTE = """Blue: every difference that a statement asks for is above 0; red: one of them is below; pale: the
seeds cannot tell, and the means lean to one side. "Seen" is what a study of a log can measure; "in truth" is what it
cannot. –: one seed, or no result. Where the pointer rests, the lowest difference is told; all of them are further
down, with their p-values."""

STATEMENTS_NOTE = f"""Each is asked of the rows, at 5 %, by one-sided Student-t tests over seeds of paired differences.
It holds where every difference that it asks for is above 0 (p is the largest of theirs), it does not where one of them
is below (p is the smallest times their number); Holm's correction is over the agents and noise levels of a statement.
Undecided: neither. PPO, RSDPO and RSIPO stand for the study's PPO, DPO and IPO, {REFERENCE}, BC and CQL for its others.
Log sizes (--log-sizes) are tested one by one. Nothing is corrected over the statements of this page nor over the two
directions: of statements about differences of exactly 0, one in ten would have a verdict."""

COSTS = """Means over all cells, whatever their log size, on the machine of the run. Preparing: pairs, rollouts,
tables of the agent's own, in processor seconds. A step is what is left of the fit's processor time over gradient
steps, with its share of the checks on validation users. The reward ensemble's scores of the log are made once and
shared."""
