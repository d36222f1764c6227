"""Dropout, and layer norm without parameters: torch's own functions, several times as fast on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsim_gr.devices import in_a_transform, wide

LANE = 16
"""Bits of randomness an element: a probability is rounded to a multiple of 2^-16."""


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """`F.dropout`: each element 0 with that probability, else scaled so that its mean stays.

    On a CPU torch draws one element at a time. Here 64 random bits of the same generator (`torch.manual_seed` sets it)
    decide four elements. The probability is rounded to a multiple of 2^-16, and what is kept is scaled by the rounded
    one, so the mean is exact.
    """
    if not training or probability == 0.0:
        return x
    if x.device.type != "cpu" or in_a_transform():
        return F.dropout(x, probability, training)
    dropped = min(round(probability * 2**LANE), 2**LANE - 1)
    words = torch.empty(-(-x.numel() * LANE // 64), dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    # a comparison written straight to floats: eight times as fast as one to bool and its conversion
    kept = torch.ge(lanes, dropped - 2 ** (LANE - 1), out=torch.empty(x.shape, dtype=x.dtype))
    return x * kept.mul_(1.0 / (1.0 - dropped / 2**LANE))


def layer_norm(x: Tensor, epsilon: float) -> Tensor:
    """`F.layer_norm` over the last dimension, without affine parameters; the result is float32 at least.

    On a CPU torch's kernel takes three times as long forward where it has no parameters; its backward is kept.
    """
    if x.device.type != "cpu" or in_a_transform():
        return F.layer_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=epsilon)
    normalised: Tensor = _LayerNorm.apply(x, epsilon)
    return normalised


class _LayerNorm(torch.autograd.Function):
    """Means are products with a vector, which is how a CPU adds fastest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            given = x.to(wide(x.dtype))
            average = given.new_full((x.shape[-1], 1), 1.0 / x.shape[-1])
            mean = given @ average
            centred = given - mean
            rate = ((centred * centred) @ average).add_(epsilon).rsqrt_()
            ctx.save_for_backward(given, mean, rate)
            ctx.dtype = x.dtype
            return centred.mul_(rate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        given, mean, rate = ctx.saved_tensors
        below, _, _ = torch.ops.aten.native_layer_norm_backward(
            above, given, given.shape[-1:], mean, rate, None, None, [True, False, False]
        )
        return below.to(ctx.dtype), None
