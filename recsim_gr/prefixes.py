"""Every prefix of every history as a context: states, masks, logits and the imitation loss on a batch of users."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsim_gr.backbones import Backbone
from recsim_gr.histories import Batch, HistorySource
from recsim_gr.sampled_softmax import Softmax
from recsim_gr.softmax import Closed, cross_entropies, weighted_cross_entropy

MASKED = -1e9
"""Added to the logits of titles that are seen or not out yet: exp of it is exactly 0 in float32, its gradient too."""


def prefix_states(backbone: Backbone, batch: Batch) -> Tensor:
    """(B, T, d): the state before each event; every prefix of every history is one context."""
    return backbone.encode(batch.titles[:, :-1], batch.scores[:, :-1], batch.times[:, :-1])


# -- logits of all titles, for what needs them all ---------------------------------------------------------------


def prefix_mask(batch: Batch, n_titles: int) -> Tensor:
    """(B, T, I) float32: `MASKED` where a title stands among the first t events or is not out yet, 0 elsewhere."""
    titles, steps = batch.titles, batch.titles.shape[1]
    order = torch.arange(steps, dtype=torch.float32, device=titles.device)
    seen_at = torch.full((len(titles), n_titles + 1), float(steps), device=titles.device)
    seen_at.scatter_(1, titles, order.expand(titles.shape))
    # t - seen_at is 1 or more where a title was seen before t; arithmetic on floats in place is twelve times as fast
    # here as a comparison of integers that broadcasts, and as fast as zeros with the seen titles filled in
    mask = (order[:, None] - seen_at[:, None, :n_titles]).clamp_(0.0, 1.0).mul_(MASKED)
    return mask if batch.unreleased is None else mask.masked_fill_(batch.unreleased[:, None], MASKED)


def prefix_logits(backbone: Backbone, batch: Batch, states: Tensor | None = None) -> Tensor:
    """(B, T, I): logits of every title before each event, `MASKED` where seen or not out yet."""
    states = prefix_states(backbone, batch) if states is None else states
    mask = prefix_mask(batch, backbone.n_titles)
    # one flat product, which adds the mask in its own pass over memory
    flat = torch.addmm(mask.flatten(0, 1), states.flatten(0, 1), backbone.title_directions().T)
    return flat.view(mask.shape)


def chosen_log_probs(log_probs: Tensor, batch: Batch) -> Tensor:
    """(B, T), of (B, T, I) log π: that of the title chosen at each event; 0 on padding."""
    targets = batch.titles.masked_fill(~batch.valid, -100)
    return -F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


# -- log π of the chosen titles, for what needs no more ----------------------------------------------------------


def prefix_log_probs(backbone: Backbone, batch: Batch, states: Tensor | None = None) -> Tensor:
    """(B, T): log π of the title chosen at each event; 0 on padding. `chosen_log_probs` without log π of
    the others."""
    states = prefix_states(backbone, batch) if states is None else states
    events = _events(batch)
    losses = cross_entropies(_at(states, events), backbone.title_directions(), events.chosen, events.closed)
    if events.valid is None:
        return -losses.view(batch.titles.shape)
    return losses.new_zeros(batch.titles.shape).masked_scatter(events.valid, -losses)


def imitation_loss(
    backbone: Backbone, batch: Batch, states: Tensor | None = None, softmax: Softmax | None = None
) -> Tensor:
    """Mean −log π(next title | prefix) of a batch, a scalar.

    Args:
        backbone: the policy.
        batch: its users' histories.
        states: `prefix_states`, where they are at hand.
        softmax: over all titles or a sample of them; by default over all.
    """
    states = prefix_states(backbone, batch) if states is None else states
    events = _events(batch)
    return _mean_loss(backbone, _at(states, events), events.chosen, events.closed, softmax)


def last_imitation_loss(backbone: Backbone, batch: Batch, softmax: Softmax | None = None) -> Tensor:
    """Mean −log π(last title | all before it) of a batch, a scalar: one context a user, who has one event at least.

    For what takes a history as one sample. Every prefix teaches far more than the last one does, but a state costs a
    backbone little where it is the only one that is asked for (`Backbone.encode_last`).
    """
    length = batch.valid.sum(dim=1)
    last = length[:, None] - 1
    before = torch.arange(batch.titles.shape[1], device=last.device) < last
    titles = batch.titles.masked_fill(~before, backbone.n_titles)[:, :-1]
    scores, times = (x.masked_fill(~before, 0.0)[:, :-1] for x in (batch.scores, batch.times))
    states = backbone.encode_last(titles, scores, times)
    users, places = before.nonzero(as_tuple=True)
    everyone = torch.arange(len(last), device=last.device)
    closed = Closed(users, batch.titles[users, places], everyone, batch.unreleased)
    return _mean_loss(backbone, states, batch.titles.gather(1, last).squeeze(1), closed, softmax)


def negative_log_likelihood(backbone: Backbone, histories: HistorySource) -> float:
    """Mean −log π(next title | prefix) over all events of the histories, in nats, over all titles; no gradients."""
    total, events = 0.0, 0
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        for batch in histories.chunks():
            total += -prefix_log_probs(backbone, batch.to(backbone.titles.device)).sum().item()
            events += int(batch.valid.sum())
    backbone.train(was_training)
    return total / events


class _Events(NamedTuple):
    """The real events of a batch, N of them, as rows.

    Attributes:
        valid: (B, T) bool, which they are; None where all are.
        chosen: (N,) their titles.
        closed: what was no choice.
    """

    valid: Tensor | None
    chosen: Tensor
    closed: Closed


def _events(batch: Batch) -> _Events:
    b, steps = batch.titles.shape
    rows, titles = _seen_before(batch.titles)
    users = torch.arange(b, device=rows.device)[:, None].expand(b, steps)
    if bool(batch.valid.all()):
        return _Events(None, batch.titles.flatten(), Closed(rows, titles, users.flatten(), batch.unreleased))
    real = batch.valid.flatten()
    there = real[rows]  # padding stands behind, so what came before a real event is real
    number = real.cumsum(dim=0) - 1
    closed = Closed(number[rows[there]], titles[there], users[batch.valid], batch.unreleased)
    return _Events(batch.valid, batch.titles[batch.valid], closed)


def _seen_before(titles: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of (B·T) and the titles at earlier places, B·T(T − 1)/2 pairs, rows ascending."""
    b, steps = titles.shape
    at, before = torch.tril_indices(steps, steps, -1, device=titles.device)
    rows = (torch.arange(b, device=titles.device)[:, None] * steps + at).flatten()
    return rows, titles[:, before].flatten()


def _at(states: Tensor, events: _Events) -> Tensor:
    """(N, d): the states before the real events."""
    return states.flatten(0, 1) if events.valid is None else states[events.valid]


def _mean_loss(backbone: Backbone, states: Tensor, chosen: Tensor, closed: Closed, softmax: Softmax | None) -> Tensor:
    weights = torch.full(chosen.shape, 1.0 / max(1, len(chosen)), device=states.device)
    sample, rows = (None, 0) if softmax is None else (softmax.sample(states.device), softmax.config.chunk_rows)
    return weighted_cross_entropy(states, backbone.title_directions(), chosen, weights, closed, sample, rows)
