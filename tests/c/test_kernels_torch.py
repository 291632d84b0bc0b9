"""Every kernel against PyTorch in double precision, with gradients from autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from c import kernel_cases as cases
from c.kernel_cases import OPS, examples
from hypothesis import given

from modicum.ops.attention import clip, scores


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


def test_nearest_resizing_takes_the_very_pixels_of_pytorch(kernels):
    """Sizes and factors whose steps are no exact floats, and those that PyTorch treats apart."""
    for n in range(1, 45):
        x = np.arange(n, dtype=np.float32)
        by_size = [(m, None) for m in range(1, 45)]
        by_factor = [(int(n * f), (1.0, f)) for f in (0.3, 0.7, 1.01, 1.1, 1.9, 2.0, 2.04, 3.3)]
        for m, factors in by_size + by_factor:
            if m == 0:
                continue
            scales = cases.resize_scales((1, n), (1, m), factors, False)
            y = np.empty(m, np.float32)
            kernels.mo_resize_nearest_forward(y, x, 1, n, 1, m, 1, *scales)
            size = None if factors else (1, m)
            want = F.interpolate(torch.tensor(x)[None, None, None], size, factors)
            assert np.array_equal(y, want.flatten()), (n, m, factors)


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
            result["counted"] = w
            result["m"], result["v"] = state["exp_avg"], state["exp_avg_sq"]
    return result


def signed_clamp(hi, **case):
    t = cases.signed_tensors(**case)
    k, c = case["k"], case["c"]
    full = F.conv2d(
        planes(t["x_in"]), double(t["w_full"]).permute(0, 3, 1, 2), double(t["bias"]), 1, k // 2
    )
    taps = double(t["w_depth"]).permute(2, 0, 1)[:, None]
    x, gamma = double(t["x"]), double(t["gamma"])
    exact = dict(
        conv=pixels(full),
        depthwise=pixels(F.conv2d(planes(t["x"]), taps, None, 1, k // 2, 1, c)),
        affine=(x - double(t["mean"])) * double(t["rstd"]) * gamma + double(t["bias"]),
        add=x + double(t["a"]),
        clamp=x,
    )
    clamped = {name: value.clamp(0, hi) for name, value in exact.items()}
    return clamped | {f"{name}_sign": value < 0 for name, value in exact.items()}


def curves(in_place, **case):
    t = cases.curve_tensors(**case)
    x, dy, want = double(t["x"], grad=True), double(t["dy"]), {}
    for name in ("hardswish", "hardsigmoid", "sigmoid", "silu"):
        y = getattr(F, name)(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        want |= {name: y, f"{name}_dx": dx}
    # -0 counts as +0 before a curve that keeps the sign, and is itself for the sign mask
    signs = dict.fromkeys(("hardswish_sign", "silu_sign"), x < 0)
    clear = ~np.signbit(t["x"])
    mask = np.packbits(clear, bitorder="little")
    return want | signs | dict(sign_mask=mask, sign_dx=t["dy"] * clear)


def product(in_place, **case):
    t = cases.product_tensors(**case)
    a, b, dy = (double(t[name]) for name in ("a", "b", "dy"))
    return dict(y=a * b, db=(dy * a).sum(0))


def batch_norm(clamp, eps, momentum, in_place, **case):
    t = cases.batch_norm_tensors(**case)
    x, gamma = double(t["x"], grad=True), double(t["gamma"], grad=True)
    beta, mean, var = double(t["beta"]), double(t["mean"]), double(t["var"])
    frozen = F.batch_norm(x, mean, var, gamma, beta, False, momentum, eps)
    y = F.batch_norm(x, mean, var, gamma, beta, True, momentum, eps)  # mean, var: in place
    dx, dgamma = torch.autograd.grad(y, (x, gamma), double(t["dy"]))
    rstd = 1 / torch.sqrt(x.var(0, correction=0) + eps)
    return dict(
        frozen=frozen.clamp(*clamp),
        y=y.clamp(*clamp),
        stats=torch.stack([x.mean(0), rstd]),
        mean=mean,
        var=var,
        dx=dx,
        dgamma=dgamma,
    )


def group_norm(groups, eps, clamp, accumulate, in_place, **case):
    t = cases.group_norm_tensors(accumulate=accumulate, **case)
    x = double(t["x"]).T[None].contiguous().requires_grad_()  # [1][c][pixels]
    gamma = double(np.ones(case["c"]) if t["gamma"] is None else t["gamma"], grad=True)
    beta = None if t["beta"] is None else double(t["beta"])
    y = F.group_norm(x, groups, gamma, beta, eps)
    dx, dgamma = torch.autograd.grad(y, (x, gamma), double(t["dy"]).T[None])
    grouped = x.reshape(groups, -1)
    rstd = 1 / torch.sqrt(grouped.var(1, correction=0) + eps)
    clamped = y[0].T.clamp(*clamp)
    return dict(
        y=clamped,
        unkept=clamped,
        stats=torch.stack([grouped.mean(1), rstd]),
        dx=dx[0].T,
        dgamma=accumulated(dgamma, t["dgamma0"], accumulate),
    )


def fused_norm(depthwise, accumulate, cut, **case):
    t = cases.fused_norm_tensors(depthwise=depthwise, accumulate=accumulate, **case)
    w, gamma = double(t["w"], grad=True), double(t["gamma"], grad=True)
    oihw = w.permute(2, 0, 1)[:, None] if depthwise else w.permute(0, 3, 1, 2)
    bias = None if t["bias"] is None else double(t["bias"])
    y = pixels(F.conv2d(planes(t["x"]), oihw, bias, groups=case["c"] if depthwise else 1))
    y = (y - double(t["mean"])) * double(t["rstd"]) * gamma
    dgamma, dw = torch.autograd.grad(y, (gamma, w), double(t["dy"]))
    return dict(dgamma=accumulated(dgamma, t["dgamma0"], accumulate), dw=dw)


def standard(eps, **case):
    t = cases.standard_tensors(**case)
    w = double(t["w"], grad=True)
    var, mean = torch.var_mean(w, 1, correction=0, keepdim=True)
    out = (w - mean) / torch.sqrt(var + eps)
    (dw,) = torch.autograd.grad(out, w, double(t["g"]))
    return dict(out=out, dw=dw)


def resize(factors, align_corners, **case):
    t, want = cases.resize_tensors(**case), {}
    for name, options in (("nearest", {}), ("bilinear", dict(align_corners=align_corners))):
        x = planes(t["x"]).requires_grad_()
        size = None if factors else case["out_size"]
        y = F.interpolate(x, size, factors, name, **options)
        (dx,) = torch.autograd.grad(y, x, planes(t["dy"]))
        want |= {name: pixels(y), f"{name}_dx": pixels(dx)}
    return want


def cosine(accumulate, label, **case):
    t = cases.cosine_tensors(accumulate=accumulate, **case)
    x, prototypes = double(t["x"], grad=True), double(t["prototypes"])
    units = (F.normalize(v, dim=-1, eps=1e-8) for v in (prototypes, x))
    y = double(t["scale"]) * (torch.matmul(*units) + double(t["bias"]))
    (dx,) = torch.autograd.grad(y, x, double(t["dy"]))
    sums = prototypes.clone()
    sums[label % len(sums)] += x.detach()
    return dict(y=y, dx=accumulated(dx, t["dx0"], accumulate), sums=sums, added=1)


def probe(accumulate, **case):
    t = cases.probe_tensors(accumulate=accumulate, **case)
    score = (double(t["x"]) * double(t["dy"])).sum(0).square() / 2
    return dict(score=accumulated(score, t["score0"], accumulate))


def branch(rho, **case):
    t = {k: double(v) for k, v in cases.branch_tensors(rho=rho, **case).items()}
    sums = t["sums"] + t["x"].abs().sum(0)
    params = (t[name] for name in ("down", "down_bias", "up", "up_bias"))
    return dict(sums=sums, gates=clip(scores(0.25 * sums, *params), rho), one=1)


def gated(case, depthwise, sides, share):
    t = cases.gated_tensors(case, depthwise, sides, share)
    whole = np.full(len(t["b"]), True)
    bw = whole if t["bw"] is None else t["bw"] > 0
    w = t["w"].transpose(2, 0, 1)[..., None] if depthwise else t["w"]
    fw = np.full(w.shape[3], True) if t["fw"] is None else t["fw"] > 0
    x, dense = planes(t["x"]), double(w).permute(0, 3, 1, 2).contiguous().requires_grad_()
    g = case["geometry"]
    high, wide = (
        (g[f"out_{d}"] - 1) * g[f"stride_{d}"]
        + (g[f"k_{d}"] - 1) * g[f"dil_{d}"]
        + 1
        - g[f"in_{d}"]
        for d in "hw"
    )
    x = F.pad(x, (g["pad_l"], wide - g["pad_l"], g["pad_t"], high - g["pad_t"]))
    strides, dilation = (g["stride_h"], g["stride_w"]), (g["dil_h"], g["dil_w"])
    y = F.conv2d(x, dense, None, strides, 0, dilation, g["groups"])
    (dw,) = torch.autograd.grad(y, dense, planes(t["dy"]))
    dw = dw[bw][:, fw].permute(0, 2, 3, 1)
    dw = accumulated(dw, t["dw0"], case["accumulate"])
    ones = double(whole)
    scale = ones if t["bw"] is None else double(t["bw"])
    step = dw * scale[bw].reshape(-1, 1, 1, 1)
    after = double(w).clone()
    rows = after[bw]
    rows[..., fw] -= 0.5 * step * (1.0 if t["fw"] is None else double(t["fw"])[fw])
    after[bw] = rows
    want = dict(dw=dw, w=after[..., 0].permute(1, 2, 0) if depthwise else after)
    if t["bw"] is None:
        return want
    db = accumulated(double(t["dy"]).sum((0, 1))[bw], t["db0"], case["accumulate"])
    b = double(t["b"]).clone()
    b[bw] -= 0.5 * db * scale[bw]
    return want | dict(db=db, b=b)


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
    signed_clamp=signed_clamp,
    curves=curves,
    product=product,
    batch_norm=batch_norm,
    group_norm=group_norm,
    fused_norm=fused_norm,
    standard=standard,
    resize=resize,
    cosine=cosine,
    probe=probe,
    branch=branch,
    gated=gated,
)
