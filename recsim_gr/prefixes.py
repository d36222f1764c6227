"""Every prefix of every history as a context: states, masks, logits and the imitation loss on a batch of users."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recsim_gr.backbones import Backbone
from recsim_gr.histories import Batch, HistorySource

MASKED = -1e9
"""Added to the logits of titles that are seen or not out yet: exp of it is exactly 0 in float32, its gradient too."""


def prefix_states(backbone: Backbone, batch: Batch) -> Tensor:
    """(B, T, d): the state before each event; every prefix of every history is one context."""
    return backbone.encode(batch.titles[:, :-1], batch.scores[:, :-1], batch.times[:, :-1])


def prefix_mask(batch: Batch, n_titles: int) -> Tensor:
    """(B, T, I) float32: `MASKED` where a title stands among the first t events or is not out yet, 0 elsewhere."""
    titles, steps = batch.titles, batch.titles.shape[1]
    order = torch.arange(steps, dtype=torch.float32, device=titles.device)
    seen_at = torch.full((len(titles), n_titles + 1), float(steps), device=titles.device)
    seen_at.scatter_(1, titles, order.expand(titles.shape))
    # t - seen_at is 1 or more where a title was seen before t; arithmetic on floats in place is twelve times as fast
    # here as a comparison of integers that broadcasts
    mask = (order[:, None] - seen_at[:, None, :n_titles]).clamp_(0.0, 1.0).mul_(MASKED)
    return mask if batch.unreleased is None else mask.masked_fill_(batch.unreleased[:, None], MASKED)


def prefix_logits(backbone: Backbone, batch: Batch, states: Tensor | None = None) -> Tensor:
    """(B, T, I): logits of every title before each event, `MASKED` where seen or not out yet."""
    states = prefix_states(backbone, batch) if states is None else states
    mask = prefix_mask(batch, backbone.n_titles)
    # one flat product, which adds the mask in its own pass over memory
    flat = torch.addmm(mask.flatten(0, 1), states.flatten(0, 1), backbone.title_directions().T)
    return flat.view(mask.shape)


def chosen_log_probs(logits: Tensor, batch: Batch) -> Tensor:
    """(B, T): log π of the title chosen at each event; 0 on padding."""
    targets = batch.titles.masked_fill(~batch.valid, -100)
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def imitation_loss(backbone: Backbone, batch: Batch, states: Tensor | None = None) -> Tensor:
    """Mean −log π(next title | prefix) of a batch, a scalar."""
    log_probs = chosen_log_probs(prefix_logits(backbone, batch, states), batch)
    return -log_probs.sum() / batch.valid.sum()


def negative_log_likelihood(backbone: Backbone, histories: HistorySource) -> float:
    """Mean −log π(next title | prefix) over all events of the histories, in nats; no gradients."""
    total, events = 0.0, 0
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        for batch in histories.chunks():
            total += -chosen_log_probs(prefix_logits(backbone, batch), batch).sum().item()
            events += int(batch.valid.sum())
    backbone.train(was_training)
    return total / events
