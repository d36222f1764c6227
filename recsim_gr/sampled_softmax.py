"""Over which titles the imitation loss goes: all of them, or a sample with the correction for its probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsim_gr.configs import require, require_finite_numbers
from recsim_gr.softmax import Sample

KINDS = ("auto", "full", "sampled")
"""Over which titles the softmax goes: all, a sample, or by the size of the catalogue."""

PROPOSALS = ("popularity", "uniform")
"""How likely a title is to be in the sample."""


@dataclass(frozen=True)
class SoftmaxConfig:
    """How the imitation loss goes over the catalogue."""

    kind: str = "auto"
    """One of `KINDS`; ``auto`` samples in catalogues larger than ``largest_full``."""
    largest_full: int = 20_000
    """Titles up to which ``auto`` takes all of them: exact, and there a loss over 6,400 rows takes ten times as long as
    with 2,048 negatives (.8 s and .08 s on one core), several times as long as all the rest of a training step."""
    negatives: int = 2_048
    """S, titles in a sample, one for all rows of a batch; the variance of a row's partition function falls as 1/S."""
    proposal: str = "popularity"
    """One of `PROPOSALS`: by popularity a sample holds the titles that a trained model is likely to mistake for the
    chosen one; ``uniform`` needs no counts."""
    chunk_rows: int = 0
    """Rows whose logits exist at a time; 0 goes by `CHUNK_BYTES` and `LEAST_ROWS`."""

    def __post_init__(self) -> None:
        require_finite_numbers(self)
        require(self.kind in KINDS, self, "kind", f"one of {', '.join(KINDS)}")
        require(self.proposal in PROPOSALS, self, "proposal", f"one of {', '.join(PROPOSALS)}")
        for name in ("largest_full", "negatives"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.chunk_rows >= 0, self, "chunk_rows", "0 or more")

    def samples(self, n_titles: int) -> bool:
        """Whether a catalogue of that size is sampled."""
        sampled = self.kind == "sampled" or (self.kind == "auto" and n_titles > self.largest_full)
        return sampled and n_titles > self.negatives


class Sampler:
    """Draws titles that stand for a catalogue: S of them, each with a known probability, all different.

    A title gets in with probability π = min(1, c·q), q its share by the proposal and c such that they add up to S, by
    Madow's systematic sampling over a random order of the titles (Annals of Mathematical Statistics 1949). A logit less
    log π is the correction of sampled softmax (Bengio and Senécal 2008; Yi et al., RecSys 2019), with the
    probability of the draw that was really made: the sum of m·exp(logit) over a sample has the catalogue's sum for its
    mean, exactly, and with S = I the sample is the catalogue. The chosen title is there whatever was drawn, so its
    own correction is log 1 = 0, and where it was drawn too, it does not count twice. (Where the others' chosen titles
    serve as negatives, a chosen one is there because it was drawn, and log q is taken from its logit as well.)

    Args:
        shares: (I,) not negative; need not add up to 1. Those at 0 are drawn as the smallest of the others.
        size: S.
    """

    def __init__(self, shares: Tensor, size: int) -> None:
        self.inclusion = inclusion_probabilities(shares, size)
        self.size = min(size, len(shares))

    def draw(self, device: torch.device | str = "cpu") -> Sample:
        """A sample, from torch's global generator."""
        n = len(self.inclusion)
        if self.size == n:
            return Sample(torch.arange(n, device=device), torch.ones(n, device=device))
        order = torch.randperm(n)
        ends = self.inclusion[order].cumsum(dim=0)
        marks = torch.arange(self.size, dtype=ends.dtype) + torch.rand((), dtype=ends.dtype)
        titles = order[torch.searchsorted(ends, marks, right=True).clamp_(max=n - 1)]
        return Sample(titles.to(device), self.inclusion[titles].reciprocal().float().to(device))


def inclusion_probabilities(shares: Tensor, size: int) -> Tensor:
    """(I,) float64: min(1, c·share), which add up to ``size``, or to I where that is less."""
    shares = shares.double().cpu()
    if len(shares) <= size:
        return torch.ones_like(shares)
    positive = shares[shares > 0]
    shares = shares.clamp(min=float(positive.min()) if len(positive) else 1.0)
    certain = torch.zeros_like(shares, dtype=torch.bool)
    while True:  # titles whose share is too large are certain, and the others share what is left
        left = size - int(certain.sum())
        found = torch.where(certain, 1.0, shares * (left / shares[~certain].sum()))
        if not (found > 1.0).any():
            return found
        certain |= found > 1.0


class Softmax:
    """A `SoftmaxConfig` over one catalogue.

    Args:
        config: how.
        n_titles: I.
        counts: (I,) how often each title was chosen; a sample by popularity takes shares of them, each with one more.

    Raises:
        ConfigError: a sample by popularity without counts.
    """

    def __init__(self, config: SoftmaxConfig, n_titles: int, counts: Tensor | None = None) -> None:
        self.config = config
        self.sampler: Sampler | None = None
        if not config.samples(n_titles):
            return
        if config.proposal == "uniform":
            shares = torch.ones(n_titles)
        else:
            require(counts is not None, config, "proposal", "'uniform' where no counts of titles are given")
            assert counts is not None
            shares = counts.double() + 1.0
        self.sampler = Sampler(shares, config.negatives)

    def sample(self, device: torch.device | str = "cpu") -> Sample | None:
        """Titles for one batch, from torch's global generator; None where all are taken."""
        return None if self.sampler is None else self.sampler.draw(device)
