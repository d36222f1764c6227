"""The Bayes reference of a simulated world: what the observations of a user are worth at best.

`BayesReference` knows the world (its titles, its laws, its noise) and sees of a user what every agent sees: the epoch,
the titles in order, their scores and times. From them it infers the posterior of the user's latents under the world's
own generative model. Ranking by the posterior mean of satisfaction is the best that any algorithm could do with the
same observations; the posterior predictive of the next title is the floor of imitation. So what lacks to `Oracle`
splits in two: ``Oracle − Bayes`` is unobservable, ``Bayes − agent`` is not learned.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsim_gr.bayes_model import FloatArray, History, UserLaw, require_separable
from recsim_gr.bayes_sampler import BayesConfig, anneal
from recsim_gr.errors import ConfigError, PolicyError
from recsim_gr.observations import LOWEST_SCORE, Observations
from recsim_gr.randomness import generator
from recsim_gr.world import World


class Diagnostics(NamedTuple):
    """How the inference went, an entry a context.

    Attributes:
        temperatures: (n,) steps from the prior to the posterior.
        acceptance: (n,) share of the moves that were accepted.
        effective_size: (n,) independent draws that would give E[s] as sure as the particles do, if they were
            independent of each other: moves repeat themselves, which this counts, and common ancestors are not counted.
        standard_error: (n,) of E[s] on the same assumption, root mean square over titles, in points.
    """

    temperatures: NDArray[np.int64]
    acceptance: FloatArray
    effective_size: FloatArray
    standard_error: FloatArray


class Posterior(NamedTuple):
    """What a batch of n contexts says.

    Attributes:
        satisfaction: (n, I) E[s(u, i) | x].
        deviation: (n, I) the posterior deviation of s(u, i).
        worth: (n, I) E[worth | x], what a recommendation is worth; satisfaction, unless ``accept`` is on.
        next_log_probs: (n, I) log P(next title | x), -inf for titles that cannot be chosen.
        log_evidence: (n,) log p(titles, scores | epoch).
        diagnostics: of the inference.
    """

    satisfaction: FloatArray
    deviation: FloatArray
    worth: FloatArray
    next_log_probs: FloatArray
    log_evidence: FloatArray
    diagnostics: Diagnostics


class Draws(NamedTuple):
    """Posterior draws of the latents of one user, one a column or an entry.

    Attributes:
        taste: (d, N) θ.
        pull: (d, N) φ.
        discernment: (N,) δ.
        leniency: (N,) b.
        free_time: (N,) minutes.
        log_likelihood: (N,) of the titles and scores.
        satisfaction: (I, N) s(u, i).
    """

    taste: FloatArray
    pull: FloatArray
    discernment: FloatArray
    leniency: FloatArray
    free_time: FloatArray
    log_likelihood: FloatArray
    satisfaction: NDArray[np.float32]


class _Context(NamedTuple):
    titles: NDArray[np.int64]
    scores: FloatArray
    hours: FloatArray
    epoch: int
    key: str


class _Summary(NamedTuple):
    satisfaction: FloatArray
    deviation: FloatArray
    worth: FloatArray
    next_log_probs: FloatArray
    log_evidence: float
    temperatures: int
    acceptance: float
    effective_size: float
    standard_error: float


class BayesReference:
    """A policy that infers its users exactly, up to Monte Carlo error; it ranks by E[worth | x].

    Its answer to a context depends on that context and the seed alone, not on the batch. The last batch is kept, so
    that ``log_probs`` and ``scores`` of the same observations cost one inference. After an appended event (a rollout)
    it takes the recommended title for a chosen one, as the model has no other kind.

    Args:
        world: a simulated world.
        config: of the sampler.

    Raises:
        ConfigError: a world that has no law of its users, or a noise model whose likelihood is of another kind.
    """

    name = "Bayes"
    referee = False

    def __init__(self, world: World, config: BayesConfig | None = None) -> None:
        if not isinstance(world, World):
            raise ConfigError(
                f"BayesReference needs a simulated World, whose users have a law; {type(world).__name__} has none"
            )
        require_separable(world)
        self.world, self.config = world, config or BayesConfig()
        self._law = UserLaw(world)
        self._last: dict[str, _Summary] = {}

    def log_probs(self, observations: Observations) -> FloatArray:
        """(n, I) log P(next title | x): the floor of imitation."""
        return self.posterior(observations).next_log_probs

    def scores(self, observations: Observations) -> FloatArray:
        """(n, I) E[worth | x]: what to rank by."""
        return self.posterior(observations).worth

    def posterior(self, observations: Observations) -> Posterior:
        """The posterior of every context.

        Raises:
            PolicyError: observations of another catalogue or of an epoch that the world does not have.
        """
        contexts = list(self._contexts(observations))
        self._last = {c.key: self._last.get(c.key) or self._summary(c) for c in contexts}
        rows = [self._last[context.key] for context in contexts]

        def table(name: str) -> FloatArray:
            return np.array([getattr(row, name) for row in rows]).reshape(len(rows), self.world.n_titles)

        def column(name: str) -> NDArray[Any]:
            return np.array([getattr(row, name) for row in rows])

        tables = (table(name) for name in Posterior._fields[:4])
        diagnostics = Diagnostics(*(column(name) for name in Diagnostics._fields))
        return Posterior._make((*tables, column("log_evidence"), diagnostics))

    def draws(self, observations: Observations) -> list[Draws]:
        """Posterior draws of every context: ``final_moves`` × ``particles`` of them, those of one move standing
        together.

        Raises:
            PolicyError: as `posterior`.
        """
        return [self._drawn(context) for context in self._contexts(observations)]

    def _contexts(self, observations: Observations) -> Iterator[_Context]:
        config = self.world.config
        if observations.n_titles != self.world.n_titles:
            raise PolicyError(f"Bayes knows {self.world.n_titles} titles, the observations {observations.n_titles}")
        for row, length in enumerate(observations.length):
            epoch = int(observations.epoch[row])
            if not 0 <= epoch < config.n_epochs:
                raise PolicyError(f"row {row} is of epoch {epoch}; the world has 0 to {config.n_epochs - 1}")
            titles = np.ascontiguousarray(observations.titles[row, :length])
            scores, hours = (np.ascontiguousarray(x[row, :length]) for x in (observations.scores, observations.times))
            digest = hashlib.blake2b(f"{epoch}".encode(), digest_size=16)
            for part in (titles, scores, hours):
                digest.update(part.tobytes())
            yield _Context(titles, scores.astype(np.float64), hours.astype(np.float64), epoch, digest.hexdigest())

    def _history(self, context: _Context) -> History:
        return History(self._law, context.titles, context.scores, context.hours, context.epoch)

    def _rng(self, context: _Context) -> np.random.Generator:
        return generator(self.config.seed, f"bayes/{context.key}")

    def _summary(self, context: _Context) -> _Summary:
        history, law = self._history(context), self._law
        sums = _Sums(self.world.n_titles, self.config.particles)
        released = self.world.release <= context.epoch
        predictive = np.zeros(len(history.choices.unseen))

        def visit(z: FloatArray) -> None:
            nonlocal predictive
            who = law.latents(z, context.epoch)
            s = law.satisfaction(z, context.epoch)
            predictive += history.choices.next_probabilities(who.weights)
            accepted = law.acceptance(who, context.epoch, released) if self.world.config.accept > 0 else None
            sums.add(s, accepted)

        run = anneal(history, self.config, self._rng(context), visit)
        next_log_probs = np.full(self.world.n_titles, -np.inf)
        with np.errstate(divide="ignore"):
            next_log_probs[history.choices.unseen] = np.log(predictive / predictive.sum())
        mean, variance, worth, error = sums.results()
        standard_error = float(np.sqrt((error**2).mean()))
        size = float(variance.mean() / max(standard_error**2, 1e-300))
        return _Summary(
            mean,
            np.sqrt(variance),
            worth,
            next_log_probs,
            run.log_evidence,
            run.temperatures,
            run.acceptance,
            size,
            standard_error,
        )

    def _drawn(self, context: _Context) -> Draws:
        history, law, config = self._history(context), self._law, self.world.config
        visited: list[FloatArray] = []
        anneal(history, self.config, self._rng(context), visited.append)
        z = np.concatenate(visited, axis=1)
        who = law.latents(z, context.epoch)
        minutes = config.free_time_median_minutes * np.exp(config.free_time_log_deviation * z[-1])
        return Draws(
            who.taste,
            who.pull,
            who.discernment,
            config.leniency_deviation * z[-2],
            minutes,
            history(z, 1.0).log_likelihood,
            law.satisfaction(z, context.epoch),
        )


class _Sums:
    """Running sums of satisfaction over moves, kept apart by particle: a particle's moves are not independent."""

    def __init__(self, n_titles: int, particles: int) -> None:
        self._by_particle = np.zeros((n_titles, particles), dtype=np.float32)
        self._square, self._worth = np.zeros(n_titles), np.zeros(n_titles)
        self._moves = 0

    def add(self, s: NDArray[np.float32], accepted: FloatArray | None) -> None:
        """(I, N) satisfaction, and the probability of acceptance where there is one."""
        self._by_particle += s
        self._square += np.einsum("in,in->i", s, s, dtype=np.float64) / s.shape[1]
        if accepted is not None:
            self._worth += LOWEST_SCORE + (accepted * (s - LOWEST_SCORE)).mean(axis=1)
        self._moves += 1

    def results(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """(I,) each: mean and variance of satisfaction, mean worth, standard error of the mean."""
        chains = self._by_particle.astype(np.float64) / self._moves
        mean = chains.mean(axis=1)
        variance = np.maximum(self._square / self._moves - mean**2, 0.0)
        worth = self._worth / self._moves if self._worth.any() else mean
        return mean, variance, worth, chains.std(axis=1, ddof=1) / np.sqrt(chains.shape[1])
