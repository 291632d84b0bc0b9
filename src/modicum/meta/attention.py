"""Meta attention of p-Meta: which channels of a layer a step updates, from what passes by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-12
REDUCTION, LEAST_HIDDEN = 4, 4


class Branch(nn.Module):
    """Scores of C channels: softmax(W2 relu(W1 v + b1) + b2), from their mean magnitudes v (C,).

    v is divided by its mean, since gradients shrink while a task is learned.  The form is that of
    dynamic convolution (Chen et al., CVPR 2020, arXiv 1912.03458); p-Meta does not say more.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(LEAST_HIDDEN, channels // REDUCTION)
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, v: Tensor) -> Tensor:
        return self.up(self.down(v / (v.mean() + EPS)).relu()).softmax(0)


class ChannelAttention(nn.Module):
    """gamma^fw over the input channels of a layer, from its input x, and gamma^bw over its output
    channels, from the gradient of its output; None for a side that is left out.
    """

    def __init__(self, inputs: int | None, outputs: int | None) -> None:
        super().__init__()
        self.fw = None if inputs is None else Branch(inputs)
        self.bw = None if outputs is None else Branch(outputs)


def magnitudes(x: Tensor) -> Tensor:
    """Mean |x| of each channel over samples and pixels: (n, C, ...) -> (C,)."""
    return x.abs().mean([d for d in range(x.dim()) if d != 1])


def clip(scores: Tensor, rho: float) -> Tensor:
    """Gates of channels with such scores (C,): the largest until their sum exceeds rho, else 0.

    Those that stay are scaled to a mean of 1, so that equal scores gate nothing but what they
    leave out.  Of equal scores the first stay.
    """
    order = scores.detach().argsort(descending=True, stable=True)
    before = scores.detach()[order].cumsum(0) - scores.detach()[order]
    keep = torch.zeros_like(scores).scatter(0, order, (before <= rho).to(scores.dtype))
    kept = scores * keep
    return kept * (keep.sum() / kept.sum())


def most_kept(channels: int, rho: float) -> int:
    """The most channels that `clip` can leave: where all scores are equal."""
    return min(channels, int(rho * channels) + 1)
