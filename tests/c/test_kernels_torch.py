"""Every kernel against PyTorch in double precision, with gradients from autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from c import kernel_cases as cases
from c.kernel_cases import OPS, examples
from hypothesis import given


@pytest.mark.parametrize("name", OPS)
def test_kernel_agrees_with_pytorch_on_generated_shapes(kernels, name):
    @examples
    @given(OPS[name].cases)
    def check(case):
        got = OPS[name].run(kernels, **case)
        want = REFERENCES[name](**case)
        assert got.keys() == want.keys()
        for key in got:
            assert_close(got[key], want[key], key)

    check()


def assert_close(got, want, what: str) -> None:
    """Within 1e-5 of the largest magnitude."""
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else np.asarray(want)
    got = np.asarray(got, np.float64).reshape(want.shape)
    limit = 1e-5 * max(0.1, float(np.abs(want).max()))
    assert np.abs(got - want).max() <= limit, f"{what}: {np.abs(got - want).max()} > {limit}"


def double(array, grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=grad)


def planes(array) -> torch.Tensor:
    """[h][w][c] -> [1][c][h][w]; contiguous, as torch 2.13 gives some grouped convolutions of
    strided images a wrong weight gradient."""
    return double(array).permute(2, 0, 1)[None].contiguous()


def pixels(tensor: torch.Tensor) -> torch.Tensor:
    """[1][c][h][w] -> [h][w][c]"""
    return tensor[0].permute(1, 2, 0)


def clamp_mask(y: torch.Tensor, lo: float, hi: float) -> torch.Tensor:
    return (lo < y) & (y < hi)


def accumulated(gradient: torch.Tensor, before: np.ndarray, accumulate: bool) -> torch.Tensor:
    return gradient + double(before) if accumulate else gradient


def convolution(depthwise: bool):
    def reference(**case):
        t = cases.conv_tensors(depthwise=depthwise, **case)
        g, (row0, row1), accumulate = case["geometry"], case["rows"], case["accumulate"]
        x, w = planes(t["x"]).requires_grad_(), double(t["w"], grad=True)
        pads = [
            (out - 1) * stride + (k - 1) * dil + 1 - size - pad
            for out, stride, k, dil, size, pad in (
                (g[f"out_{a}"], g[f"stride_{a}"], g[f"k_{a}"], g[f"dil_{a}"], g[f"in_{a}"], p)
                for a, p in (("w", g["pad_l"]), ("h", g["pad_t"]))
            )
        ]
        # a negative pad crops what the stride leaves over
        padded = F.pad(x, (g["pad_l"], pads[0], g["pad_t"], pads[1]))
        oihw = w.permute(2, 0, 1)[:, None] if depthwise else w.permute(0, 3, 1, 2)
        y = F.conv2d(
            padded,
            oihw,
            None if t["b"] is None else double(t["b"]),
            (g["stride_h"], g["stride_w"]),
            0,
            (g["dil_h"], g["dil_w"]),
            g["groups"],
        )
        dx, dw = torch.autograd.grad(y, (x, w), planes(t["dy"]))
        return dict(
            y=pixels(y).clamp(*case["clamp"]),
            dx=accumulated(pixels(dx), t["dx0"], accumulate),
            dw=accumulated(dw[row0:row1], t["dw0"], accumulate),
        )

    return reference


def affine(clamp, accumulate, in_place, **case):
    t = cases.affine_tensors(accumulate=accumulate, **case)
    x, dy, gamma, beta, mean, rstd = (
        double(t[name]) for name in ("x", "dy", "gamma", "beta", "mean", "rstd")
    )
    for tensor in (x, gamma, beta):
        tensor.requires_grad_()
    y = (x - mean) * rstd * gamma + beta
    dx, dgamma, db = torch.autograd.grad(y, (x, gamma, beta), dy)
    return dict(
        y=y.clamp(*clamp),
        dx=dx,
        dgamma=accumulated(dgamma, t["dgamma0"], accumulate),
        db=accumulated(db, t["db0"], accumulate),
    )


def activation(clamp, in_place, **case):
    t = cases.flat_tensors(**case)
    y = double(t["a"]).clamp(*clamp)
    inside = clamp_mask(y, *clamp)
    packed = np.packbits(inside.numpy(), bitorder="little")
    gradient = double(t["dy"]) * inside
    return dict(y=y, mask=packed, by_mask=gradient, by_output=gradient)


def add(clamp, in_place, **case):
    t = cases.flat_tensors(**case)
    return dict(y=(double(t["a"]) + double(t["b"])).clamp(*clamp))


def max_pool(**case):
    t, g = cases.pool_tensors(**case), case["window"]
    x = planes(t["x"]).requires_grad_()
    y, index = F.max_pool2d(
        x,
        (g["k_h"], g["k_w"]),
        (g["stride_h"], g["stride_w"]),
        (g["pad_t"], g["pad_l"]),
        (g["dil_h"], g["dil_w"]),
        case["ceil_mode"],
        return_indices=True,
    )
    (dx,) = torch.autograd.grad(y, x, planes(t["dy"]))
    index = pixels(index)
    origin_h = (torch.arange(g["out_h"]) * g["stride_h"] - g["pad_t"])[:, None, None]
    origin_w = (torch.arange(g["out_w"]) * g["stride_w"] - g["pad_l"])[None, :, None]
    tap_h = (index // g["in_w"] - origin_h) // g["dil_h"]
    tap_w = (index % g["in_w"] - origin_w) // g["dil_w"]
    winner = (tap_h * g["k_w"] + tap_w).numpy().astype(np.uint8).ravel()
    bits = next(bits for bits in (2, 4, 8) if g["k_h"] * g["k_w"] <= 1 << bits)
    code = np.packbits((winner[:, None] >> np.arange(bits)) & 1, bitorder="little")
    return dict(y=pixels(y), without_code=pixels(y), dx=pixels(dx), code=code)


def average_pool(**case):
    t, g = cases.pool_tensors(**case), case["window"]
    x = planes(t["x"]).requires_grad_()
    y = F.avg_pool2d(
        x,
        (g["k_h"], g["k_w"]),
        (g["stride_h"], g["stride_w"]),
        (g["pad_t"], g["pad_l"]),
        case["ceil_mode"],
        case["include_pad"],
        case["divisor"] or None,
    )
    (dx,) = torch.autograd.grad(y, x, planes(t["dy"]))
    return dict(y=pixels(y), dx=pixels(dx))


def adaptive_pool(out_size, **case):
    t = cases.adaptive_tensors(out_size=out_size, **case)
    x = planes(t["x"]).requires_grad_()
    y = F.adaptive_avg_pool2d(x, out_size)
    (dx,) = torch.autograd.grad(y, x, planes(t["dy"]))
    return dict(y=pixels(y), dx=pixels(dx))


def move(shape, out, inside, accumulate, **case):
    t, (rows, taps, cols) = cases.move_tensors(shape=shape, out=out, inside=inside, **case), shape
    base, full = t["base"], t["base"].copy()
    for a, row in enumerate(out or range(rows)):
        for b, col in enumerate(inside or range(cols)):
            full[row, :, col] = t["slice"][a, :, b]
    flat = base.reshape(rows * taps, cols)
    copied = base.copy()
    copied[:, 0] = base[:, -1] + (copied[:, 0] if accumulate else 0)
    gathered = flat[:, inside or slice(None)]
    return dict(full=full, gathered=gathered, transposed=flat.T, copied=copied)


def loss(scale, **case):
    t = cases.loss_tensors(**case)
    z, label = double(t["z"], grad=True), torch.tensor(t["label"])
    cross_entropy, mse = F.cross_entropy(z, label), F.mse_loss(z, double(t["target"]))
    (dz,), (dz_mse,) = (torch.autograd.grad(value, z) for value in (cross_entropy, mse))
    return dict(loss=cross_entropy, dz=scale * dz, mse=mse, dz_mse=scale * dz_mse)


def update(weight_decay, **case):
    t = cases.update_tensors(**case)
    adam = {key: cases.ADAM[key] for key in ("lr", "eps")}
    betas = cases.ADAM["beta1"], cases.ADAM["beta2"]
    optimizers = dict(
        sgd=lambda p: torch.optim.SGD(p, 0.1, weight_decay=weight_decay),
        momentum=lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=weight_decay),
        adam=lambda p: torch.optim.Adam(p, **adam, betas=betas, weight_decay=weight_decay),
    )
    result = {}
    for name, make in optimizers.items():
        w = double(t["w"], grad=True)
        optimizer = make([w])
        for g in t["g"]:
            w.grad = double(g)
            optimizer.step()
        result[name] = w
        state = optimizer.state[w]
        if name == "momentum":
            result["velocity"] = state["momentum_buffer"]
        if name == "adam":
            result["m"], result["v"] = state["exp_avg"], state["exp_avg_sq"]
    return result


REFERENCES = dict(
    conv2d=convolution(depthwise=False),
    pointwise=convolution(depthwise=False),
    depthwise=convolution(depthwise=True),
    affine=affine,
    activation=activation,
    add=add,
    max_pool=max_pool,
    average_pool=average_pool,
    adaptive_pool=adaptive_pool,
    move=move,
    loss=loss,
    update=update,
)
