"""Batch norm by the statistics of a batch, with its second derivatives in closed form.

PyTorch's own are made up of some fifty operations, which take a quarter of an update of MAML, and
leave gradients in another memory layout than their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """weight (x - mean) / sqrt(var + eps) + bias for x (n, c, ...), by the mean and the biased
    variance of each channel.  It can be differentiated twice, and not under torch.func."""
    return _Norm.apply(x, weight, bias, eps)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return (*_Backward.apply(g, *ctx.saved_tensors, ctx.eps), None)


class _Backward(Function):
    """(dx, dweight, dbias) of g = dy; `scale` is 1 / sqrt(var + eps)."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias = _backward(g, x, weight, mean, scale, eps)
        ctx.save_for_backward(g, x, weight, mean, scale, dweight, dbias)
        ctx.eps = eps
        return dx, dweight, dbias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, v_weight: Tensor, v_bias: Tensor) -> tuple[Any, ...]:
        """Of <v, dx> + <v_weight, dweight> + <v_bias, dbias> by g, x and weight.

        With z = (x - mean) scale, w = weight, s = scale, means over all but the channels, and
        k = v_weight - w s mean(v z), q = mean(v g) - mean(v) mean(g) - mean(v z) mean(g z):

            by g       w s (v - mean(v) - z mean(v z)) + v_weight z + v_bias
            by x       s k (g - mean(g) - z mean(g z))
                       - s mean(g z) w s (v - mean(v) - z mean(v z)) - w s^2 q z
            by weight  n s q

        of which the first term of the first line, p, is a backward pass of v.
        """
        g, x, weight, mean, scale, dweight, dbias = ctx.saved_tensors
        layout = torch.contiguous_format
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        g, v = g.contiguous(memory_format=layout), v.contiguous(memory_format=layout)
        n = x.numel() // x.shape[1]
        p, vz, v1 = _backward(v, x, weight, mean, scale, ctx.eps)
        vg = (v * g).sum([0, *range(2, x.dim())])
        vg, vz, v1, gz, g1 = torch.stack((vg, vz, v1, dweight, dbias)).div_(n).unbind()
        sq = scale * vg.addcmul_(v1, g1, value=-1).addcmul_(vz, gz, value=-1)
        ws = weight * scale
        sk = torch.addcmul(v_weight, ws, vz, value=-1) * scale
        # each is a sum of multiples of g, v, p and x = mean + z / scale, and of a constant
        by_x = -scale * torch.addcmul(ws * sq, sk, gz)
        by_g = scale * v_weight
        factors = (
            *(sk, -scale * gz, by_x, -torch.addcmul(by_x * mean, sk, g1)),
            *(by_g, torch.addcmul(v_bias, by_g, mean, value=-1)),
        )
        shape = (len(factors), -1, *[1] * (x.dim() - 2))
        of_g, of_p, of_x, constant, own, rest = torch.stack(factors).view(shape).unbind()
        dx = torch.addcmul(constant, g, of_g).addcmul_(p, of_p).addcmul_(x, of_x)
        return p.addcmul_(x, own).add_(rest), dx, n * sq, None, None, None


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
    )
    return made
