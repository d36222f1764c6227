"""How users behave: the config that simulated and replayed worlds share, and what it makes of a user."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from recsim_gr import configs
from recsim_gr.configs import require
from recsim_gr.noise import NOISE_MODELS

FloatArray = NDArray[np.float64]
Users = NDArray[np.int64]

SPLITS = ("train", "validation", "test", "judge")
"""Disjoint groups of users: what agents learn from, select on, are tested on, and what the judge learns from."""


SAMPLERS = {
    "auto": "the fastest that is exact for the world",
    "gumbel": "Gumbel noise on every title and the top in order: a random number a title and user",
    "inverse_cdf": "draws with replacement, repeats skipped: a random number a draw, for large catalogues",
    "stepwise": "one choice after the other, each from what its past leaves: the only one where order matters",
}
"""Name and what it does; all draw Plackett–Luce sequences."""

LARGE_CATALOGUE = 10_000
"""Titles from which on ``auto`` draws by ``inverse_cdf``: above, random numbers for all titles take most of it."""


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig:
    """How users choose and what is observed of it: what simulated and replayed worlds have in common."""

    history_length: int = 20
    """Events logged a user, and the length of a test context: short enough for the quick preset, long enough that
    tastes can be inferred."""
    n_epochs: int = 4
    """Epochs; training, validation and judge users come from all but the last, test users from the last. Four: three to
    learn from, so that a trend can be told from a level, and one to be tested in."""
    pull_strength: float = 2.0
    """κ, the weight of a user's pull in the choice. With the other defaults the perplexity of logged choices (exp of
    the mean of −log propensity, seeds 0 to 2) is about 60 at 200 titles and 240 at 1,000: choices are personal, but far
    from predictable."""
    discernment_alpha: float = 0.5
    """First parameter of the Beta law of discernment, see ``discernment_beta``."""
    discernment_beta: float = 0.5
    """Beta law of discernment δ; (½, ½) is U-shaped: many users choose almost only what they will love, as many
    follow trends and outside suggestions, and few are in between."""
    appeal_tail: float = 1.0
    """Base appeal is exponential with this mean, so that exp(appeal) is Pareto of tail index 1/appeal_tail; at 1 a
    crowd that followed appeal alone would make Zipf's law. Popularity itself is flatter, since half the users hardly
    follow it (`recsim-gr world` draws it beside real catalogues)."""
    appeal_persistence: float = 0.8
    """AR(1) coefficient of appeal (on its Gaussian scale) from one epoch to the next: trends that outlive an epoch
    and are mostly gone after five."""
    duration_median_minutes: float = 40.0
    """Of log-normal durations, see ``duration_log_deviation``."""
    duration_log_deviation: float = 0.6
    """Log-normal durations; 40 minutes with 90 % between 15 and 107: episodes and films."""
    free_time_median_minutes: float = 40.0
    """Of τ, the mean free time of a user's exogenous sessions, see ``free_time_log_deviation``."""
    free_time_log_deviation: float = 0.5
    """Log-normal over users: mean free time τ of an exogenous session, of the order of a title's duration."""
    reward_noise: float = 0.5
    """ν, the dial of the noise model: the share of exogenous events under ``watch_time``. The middle of the dial,
    where a score keeps a tenth of the signal (within-user reliability .11); not calibrated yet."""
    noise_model: str = "watch_time"
    """Name of the noise model, see `recsim_gr.noise`; watch time is what recommenders are trained on."""
    history_median: int = 0
    """Median length of a history where lengths vary: log-normal, at least 1, and cut at ``history_length``, where
    logging stops. 0: every history is full, which keeps batches free of padding."""
    history_log_deviation: float = 1.0
    """Of the log of the length, where lengths vary: that of the wider halves (1.03, 1.04; the narrower .81, .83) of
    MovieLens-100K's and KuaiRec's quantiles, 23/65/244 and 25/95/276 events at 10/50/90 %."""
    cold_share: float = 0.0
    """Share of the titles that come out after the first epoch, as many in each later one. 0: all are there from the
    beginning, and titles need no metadata to be represented."""
    order_effect: float = 0.0
    """Weight of what the titles of the last hours carry over to the next choice: their direction, fading with the gap
    (`recsim_gr.world_base.CARRY_OVER_HOURS`). 0: what is chosen next depends on the *set* of titles seen and never on
    their order; 1 is half of `pull_strength`."""
    accept: float = 0.0
    """Dial of the acceptance model, 0 to 1: a recommended title is abandoned at once with probability ``accept`` times
    the probability that the user prefers what else there is (`acceptance_probability`). At 1 a random title is accepted
    a quarter of the time, the logging policy's own choice three quarters. 0: forced exposure, so that what is shown is
    watched, and the log's users (who chose) are the only ones who select."""
    duration_debiased: bool = False
    """Whether the score is the quantile of the watched fraction among titles of like duration instead of the fraction
    itself: an option of the reward (``watch_time`` only). It removes most of the bias towards short titles and none of
    the noise (alignment .64 → .93 at dial ½, mean of seeds 0 to 3), and where there was no bias it costs a little
    (1.00 → .95 at dial 0)."""
    sampler: str = "auto"
    """How histories are drawn, see `SAMPLERS`; the law is the same, the random numbers are not."""
    seed: int = 0
    """Names the world: everything random in it follows from the seed."""

    def __post_init__(self) -> None:
        configs.require_finite_numbers(self)
        require(self.history_length >= 1, self, "history_length", "at least 1")
        require(self.n_epochs >= 1, self, "n_epochs", "at least 1")
        require(self.seed >= 0, self, "seed", "0 or more")
        require(0.0 <= self.reward_noise <= 1.0, self, "reward_noise", "between 0 and 1")
        known = tuple(NOISE_MODELS)  # a tuple: also what has no hash is refused by name
        require(self.noise_model in known, self, "noise_model", f"one of {', '.join(known)}")
        require(
            0 <= self.history_median <= self.history_length,
            self,
            "history_median",
            f"0 to history_length ({self.history_length})",
        )
        require(self.history_log_deviation >= 0, self, "history_log_deviation", "0 or more")
        require(0.0 <= self.cold_share < 1.0, self, "cold_share", "in [0, 1)")
        later = self.cold_share == 0 or self.n_epochs >= 2
        require(later, self, "cold_share", "0 where there is one epoch, since nothing can come out later")
        require(self.order_effect >= 0, self, "order_effect", "0 or more")
        require(0.0 <= self.accept <= 1.0, self, "accept", "between 0 and 1")
        require(isinstance(self.duration_debiased, bool), self, "duration_debiased", "True or False")
        timed = not self.duration_debiased or self.noise_model == "watch_time"
        require(timed, self, "duration_debiased", "False unless noise_model is 'watch_time', which has watch times")
        require(self.sampler in tuple(SAMPLERS), self, "sampler", f"one of {', '.join(SAMPLERS)}")
        stepwise = self.order_effect == 0 or self.sampler in ("auto", "stepwise")
        require(stepwise, self, "sampler", "'auto' or 'stepwise' where order_effect is on")
        require(self.pull_strength >= 0, self, "pull_strength", "0 or more")
        require(self.appeal_tail >= 0, self, "appeal_tail", "0 or more")
        require(0.0 <= self.appeal_persistence <= 1.0, self, "appeal_persistence", "between 0 and 1")
        for name in ("discernment_alpha", "discernment_beta"):
            require(getattr(self, name) > 0, self, name, "positive")
        for name in ("duration", "free_time"):
            median, deviation = f"{name}_median_minutes", f"{name}_log_deviation"
            require(0 < getattr(self, median) <= 1e6, self, median, "positive, and at most a million")
            require(0 <= getattr(self, deviation) <= 10, self, deviation, "0 to 10")


class Behaviour(NamedTuple):
    """What moves a group of users beside their taste; a row a user.

    Attributes:
        epoch: (n,) int64.
        discernment: (n,) in [0, 1].
        free_time: (n,) minutes, the mean of an exogenous session.
    """

    epoch: NDArray[np.int64]
    discernment: FloatArray
    free_time: FloatArray


def n_cold(config: BehaviourConfig, n_titles: int) -> int:
    """How many titles come out after the first epoch."""
    return round(config.cold_share * n_titles)


def require_room(config: BehaviourConfig, n_titles: int) -> None:
    """Refuses histories that the first epoch's titles cannot fill, and leave one to recommend.

    Raises:
        ConfigError: names the field and what would do.
    """
    there = n_titles - n_cold(config, n_titles)
    what = f"the catalogue ({n_titles} titles)" if there == n_titles else f"the {there} titles of the first epoch"
    would_do = f"smaller than {what}, since no title is seen twice"
    require(config.history_length < there, config, "history_length", would_do)
    some = config.cold_share == 0 or there < n_titles
    require(some, config, "cold_share", f"0, or large enough for one of {n_titles} titles")


def acceptance_probability(utility: FloatArray, outside: FloatArray, dial: float) -> FloatArray:
    """P(a recommended title is watched), elementwise: 1 − dial·σ(outside − utility).

    Args:
        utility: of the title in the logging policy, without what earlier titles carry over.
        outside: log of the mean of exp(utility) over the titles that are out: what else there is.
        dial: 0 accepts everything; at 1 a title as attractive as the mean of the others is accepted half of the time.
    """
    probability: FloatArray = 1.0 - dial * expit(outside - utility)
    return probability
