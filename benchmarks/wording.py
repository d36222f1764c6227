"""The words of the report: headings, explanations, and how to read it."""

from recsim_gr.benchmarks.charts import CEILING, REFERENCE

# A metric's name and its heading in a table; what it is says recsim_gr.scoring.METRICS.
VALUES = {
    "value_sampled": "sampled",
    "value_greedy": "greedy",
    "value_top10": "top-10",
    "value_top10_se": "± users",
    "score_value_sampled": "score, sampled",
    "score_value_greedy": "score, greedy",
    "score_value_top10": "score, top-10",
    "regret_sampled": "regret, sampled",
    "regret_greedy": "regret, greedy",
    "regret_top10": "regret, top-10",
}
JUDGE = {
    "judge_return": "judge",
    "judge_return_sd": "± users",
    "score_return": "expected score",
    "value_return": "satisfaction",
    "overoptimisation": "overoptimisation",
    "misalignment": "misalignment",
}
SUPPORT = {
    "kl_ref": "KL",
    "entropy": "entropy",
    "effective_sample_size": "effective sample",
    "coverage": "coverage",
    "popularity_gini": "Gini",
    "nll": "NLL",
}
OFFLINE = {
    f"{metric}{twin}": heading + (twin and f", {twin[1:]}")
    for twin in ("", "_true", "_own")
    for metric, heading in (("ndcg10", "NDCG@10"), ("hr10", "HR@10"), ("mrr", "MRR"))
}
COLD = {
    "cold_available": "share that is cold",
    "cold_top10": "share in top-10",
    "value_top10_warm": "top-10, warm",
    "value_top10_cold": "top-10, cold",
} | {
    f"{metric}_{group}": f"{heading}, {group}"
    for group in ("warm", "cold")
    for metric, heading in (("ndcg10", "NDCG@10"), ("hr10", "HR@10"), ("mrr", "MRR"))
}
# Of the world: heading and what it is. Metrics that are not here are shown under their own names.
WORLD_METRICS = {
    "reliability_pooled": ("reliability, pooled", "signed corr² of score and satisfaction, logged events"),
    "reliability_within": ("reliability, within user", "the same inside users: the axis of the pictures"),
    "alignment": ("alignment", "the same of the expected score: what a perfect model of the score knows"),
    "nll_test": ("test users", "of the pretrained backbone, on test users, who come from a later epoch"),
    "nll_validation": ("validation users", "of the pretrained backbone, on validation users"),
    "nll_logging": ("logging policy", "of the logging policy, which knows the user: out of reach"),
    "reward_rmse_test": ("ensemble, RMSE", "error of the reward ensemble's scores on test users"),
    "reward_rmse_validation": ("ensemble, RMSE, validation", "the same on validation users"),
    "reward_rmse_user_mean": ("user's mean, RMSE", "error of a user's average score so far"),
    "reward_rmse_title_mean": ("title's mean, RMSE", "error of a title's average score, shrunk"),
    "reward_truth_corr2": ("ensemble, corr² with the truth", "signed, inside users, over unseen titles"),
    "title_mean_truth_corr2": ("title's mean, corr² with the truth", "the same of titles' average scores"),
}
GROUPS = (
    ("reliability", "How good the score is"),
    ("alignment", "How good the score is"),
    ("nll", "Imitation: negative log-likelihood of the next title"),
    ("reward", "The reward model, beside two averages"),
    ("title_mean", "The reward model, beside two averages"),
    ("judge", "The judge"),
    ("", "Others"),
)
OTHER_TERMS = {
    "ν, reward noise": "the dial: share of exogenous events (watch_time), size of the noise (other models)",
    "place": f"(value − {REFERENCE}'s) / ({CEILING}'s − {REFERENCE}'s), top-10, seed by seed",
    "p": f"one-sided Student-t test of being above {REFERENCE}, Holm's correction over a level's learners",
}
READINGS = {
    "landscape": f"""Height: how much more satisfying an agent's ten titles are than {REFERENCE}'s for
the same users, in points of the 1–5 scale. Zero is plain imitation; below it, post-training did harm.
The upper panel is scaled to the learners; ceilings, baselines and collapsed agents leave it, and the
lower panel has them all (shaded: the range of the upper one).""",
    "place": f"""The same as a share of the way from {REFERENCE} to {CEILING}, so that worlds of
different size can be compared.""",
    "judge_against_truth": """Across: what a reward model trained on other users gives an agent's
recommendations over three steps. Up: true satisfaction over as many steps in the true world. Below the diagonal
the judge is too kind.""",
    "overoptimisation": """Upper panel, above zero: the reward model promises more than the titles
score. Lower panel, above zero: the score promises more than the user is satisfied. Steps and discount
are the same on both sides.""",
    "support": """How far an agent moved from the pretrained policy (square-root axis, so that small
steps stay apart) and what it is worth there. Far to the right the log has little to say.""",
    "offline_metrics": """What a study of logged data would see: does the policy rank the title that
was really taken next? Left on users with high scores, right on users who are truly satisfied. Compare
the order of the lines with the landscape's.""",
}
USE = """Hover for numbers; click an agent in the legend to see it alone (shift-click for more,
double-click for all)."""
HOW_TO_READ = """<ul class="reading">
<li>Values are exact over titles: the whole catalogue is scored with the users' true satisfaction (the
three-step returns beside the judge are sampled).
What is left is the draw of the users and of the seed.</li>
<li>%s</li>
<li>The axis is the within-user reliability of the score, measured: its squared correlation with
satisfaction inside a user's history, which is all that a ranking can use.</li>
<li>%s</li>
<li>Grey agents are no competitors: ceilings (▲▼) know the user, baselines are not post-trained.</li>
</ul>
"""
WITH_REFERENCE = f"""The reference is <b>{REFERENCE}</b>: the same backbone, trained on by imitation for as
many steps. Differences to it are taken on the same test users, seed by seed."""
NO_REFERENCE = f"""<b>{REFERENCE} is not part of this run</b>, so there are no differences, places or
p-values, and the landscape shows the values themselves."""
ONE_SEED = """<b>This run has one seed, so there are no intervals and no p-values</b>: a difference
here may be the luck of one world and one initialisation."""
SEEDS = """± is half of a 95 %% Student-t interval over %d seeds. With few seeds it is wide, and
rightly so (4.3 standard errors at three seeds, 2.3 at ten): an interval that holds zero means “not
known”, not “no difference”. p is one-sided and corrected by Holm over the %d learners of a level;
neither ± nor p is corrected over levels or metrics."""
CHECKS = """What must hold whatever the ranking between algorithms; where one fails, look for a bug before a finding."""
