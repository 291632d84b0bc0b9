"""THE table of kernel calls: for each kernel, generated inputs and how to call it.

The same cases are compared with PyTorch, replayed under the sanitizers, and run through builds
with other vector widths, which must agree to the bit.  No PyTorch here: a sanitized process
imports this file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from c.kernels import Geometry, Kernels, Window
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

Arrays = dict[str, np.ndarray]

# the same cases in every run and every process
examples = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)

RANGES = [(-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0), (-0.5, 0.75)]
clamps = st.sampled_from(RANGES)
seeds = st.integers(0, 2**31)
# around one, two and four vectors of 4, 8 and 16 lanes
channels = st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 32, 33, 40, 48, 67, 130]))
sizes = st.integers(1, 9)


@dataclass(frozen=True)
class Op:
    """`cases` yields keyword arguments of `run`, which returns every array that the call wrote."""

    cases: st.SearchStrategy[dict]
    run: Callable[..., Arrays]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def unwritten(*shape: int) -> np.ndarray:
    """An output that gives itself away where the kernel does not write."""
    return np.full(shape, np.nan, np.float32)


def target(rng: np.random.Generator, accumulate: bool, *shape: int) -> np.ndarray:
    return normal(rng, *shape) if accumulate else unwritten(*shape)


@st.composite
def convolutions(draw, depthwise: bool) -> dict:
    k_h, k_w = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    dil_h, dil_w = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
    most = [
        k // 2 * dil + draw(st.sampled_from([0, 0, 0, 9]))
        for k, dil in ((k_h, dil_h), (k_w, dil_w))
    ]
    pads = [draw(st.integers(0, pad)) for pad in most for _ in range(2)]
    in_h, in_w = draw(st.one_of(sizes, st.integers(10, 21))), draw(st.integers(1, 21))
    reach_h, reach_w = (k_h - 1) * dil_h + 1, (k_w - 1) * dil_w + 1
    assume(in_h + pads[0] + pads[1] >= reach_h and in_w + pads[2] + pads[3] >= reach_w)
    stride_h, stride_w = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)]))
    if depthwise:
        in_c = out_c = groups = draw(channels)
    else:
        groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
        in_c, out_c = groups * draw(st.integers(1, 20)), groups * draw(channels)
    geometry = dict(
        in_h=in_h,
        in_w=in_w,
        in_c=in_c,
        out_h=(in_h + pads[0] + pads[1] - reach_h) // stride_h + 1,
        out_w=(in_w + pads[2] + pads[3] - reach_w) // stride_w + 1,
        out_c=out_c,
        k_h=k_h,
        k_w=k_w,
        stride_h=stride_h,
        stride_w=stride_w,
        pad_t=pads[0],
        pad_l=pads[2],
        dil_h=dil_h,
        dil_w=dil_w,
        groups=groups,
    )
    return _with_options(draw, geometry, rows=k_h if depthwise else out_c)


@st.composite
def pointwise(draw) -> dict:
    """1x1 convolutions and, with one pixel, linear layers: more channels than above."""
    h, w = draw(st.sampled_from([(1, 1), (1, 2), (1, 5), (2, 3), (4, 4), (5, 5), (9, 7), (16, 16)]))
    stride = draw(st.sampled_from([1, 1, 1, 2]))
    geometry = dict(
        in_h=h,
        in_w=w,
        in_c=draw(st.one_of(channels, st.integers(100, 300))),
        out_h=(h - 1) // stride + 1,
        out_w=(w - 1) // stride + 1,
        out_c=draw(st.one_of(channels, st.integers(100, 300))),
        k_h=1,
        k_w=1,
        stride_h=stride,
        stride_w=stride,
        pad_t=0,
        pad_l=0,
        dil_h=1,
        dil_w=1,
        groups=1,
    )
    return _with_options(draw, geometry, rows=geometry["out_c"])


def _with_options(draw, geometry: dict, rows: int) -> dict:
    row0 = draw(st.sampled_from([0, 0, rows // 3]))
    return dict(
        geometry=geometry,
        seed=draw(seeds),
        bias=draw(st.booleans()),
        clamp=draw(clamps),
        accumulate=draw(st.booleans()),
        rows=(row0, draw(st.sampled_from([rows, rows, max(row0 + 1, rows // 2)]))),
    )


def conv_tensors(geometry, seed, bias, accumulate, rows, depthwise=False, **_) -> Arrays:
    """Inputs of a convolution and its gradients, by name."""
    g, rng = Geometry(**geometry), np.random.default_rng(seed)
    n = rows[1] - rows[0]
    if depthwise:
        w_shape, dw_shape = (g.k_h, g.k_w, g.out_c), (n, g.k_w, g.out_c)
        w_size = g.k_h * g.k_w
    else:
        w_shape = (g.out_c, g.k_h, g.k_w, g.in_c // g.groups)
        dw_shape = (n, *w_shape[1:])
        w_size = g.k_h * g.k_w * g.in_c // g.groups
    return dict(
        x=normal(rng, g.in_h, g.in_w, g.in_c),
        w=normal(rng, *w_shape) / np.float32(np.sqrt(w_size)),  # y stays near 1
        b=normal(rng, g.out_c) if bias else None,
        dy=normal(rng, g.out_h, g.out_w, g.out_c),
        dx0=target(rng, accumulate, g.in_h, g.in_w, g.in_c),
        dw0=target(rng, accumulate, *dw_shape),
    )


def _run_convolution(name: str) -> Callable[..., Arrays]:
    def run(kernels: Kernels, **case) -> Arrays:
        g, (lo, hi) = Geometry(**case["geometry"]), case["clamp"]
        t = conv_tensors(depthwise=name == "depthwise", **case)
        y, dx, dw = unwritten(*t["dy"].shape), t["dx0"].copy(), t["dw0"].copy()
        accumulate, (row0, row1) = case["accumulate"], case["rows"]
        getattr(kernels, f"mo_{name}_forward")(y, t["x"], t["w"], t["b"], g, lo, hi)
        getattr(kernels, f"mo_{name}_dx")(dx, t["dy"], t["w"], g, accumulate)
        getattr(kernels, f"mo_{name}_dw")(dw, t["dy"], t["x"], g, row0, row1, accumulate)
        return dict(y=y, dx=dx, dw=dw)

    return run


per_channel = st.fixed_dictionaries(
    dict(
        seed=seeds,
        pixels=st.integers(1, 40),
        c=channels,
        clamp=clamps,
        accumulate=st.booleans(),
        in_place=st.booleans(),
    )
)


def affine_tensors(seed, pixels, c, accumulate, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(
        x=normal(rng, pixels, c),
        dy=normal(rng, pixels, c),
        gamma=normal(rng, c),
        beta=normal(rng, c),
        mean=normal(rng, c),
        rstd=np.abs(normal(rng, c)) + np.float32(0.1),
        db0=target(rng, accumulate, c),
        dgamma0=target(rng, accumulate, c),
    )


def _run_affine(kernels: Kernels, pixels, c, clamp, accumulate, in_place, **case) -> Arrays:
    t = affine_tensors(pixels=pixels, c=c, accumulate=accumulate, **case)
    y, dx = unwritten(pixels, c), unwritten(pixels, c)
    if in_place:
        y, dx = t["x"].copy(), t["dy"].copy()
    db, dgamma = t["db0"].copy(), t["dgamma0"].copy()
    x, dy = (y, dx) if in_place else (t["x"], t["dy"])
    parameters = t["gamma"], t["beta"], t["mean"], t["rstd"]
    kernels.mo_affine_forward(y, x, *parameters, pixels, c, *clamp)
    kernels.mo_affine_dx(dx, dy, t["gamma"], t["rstd"], pixels, c)
    kernels.mo_affine_dgamma(dgamma, t["dy"], t["x"], t["mean"], t["rstd"], pixels, c, accumulate)
    kernels.mo_bias_grad(db, t["dy"], pixels, c, accumulate)
    return dict(y=y, dx=dx, dgamma=dgamma, db=db)


elementwise = st.fixed_dictionaries(
    dict(seed=seeds, n=st.integers(1, 300), clamp=clamps, in_place=st.booleans())
)


def flat_tensors(seed, n, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: normal(rng, n) for name in ("a", "b", "dy")}


def _run_activation(kernels: Kernels, n, clamp, in_place, **case) -> Arrays:
    t = flat_tensors(n=n, **case)
    y = t["a"].copy() if in_place else unwritten(n)
    kernels.mo_clamp_forward(y, y if in_place else t["a"], n, *clamp)
    mask = np.full((n + 7) // 8, 0xFF, np.uint8)
    kernels.mo_mask_pack(mask, y, n, *clamp)
    by_mask, by_output = unwritten(n), unwritten(n)
    if in_place:
        by_mask, by_output = t["dy"].copy(), t["dy"].copy()
    kernels.mo_mask_backward(by_mask, by_mask if in_place else t["dy"], mask, n)
    kernels.mo_clamp_backward(by_output, by_output if in_place else t["dy"], y, n, *clamp)
    return dict(y=y, mask=mask, by_mask=by_mask, by_output=by_output)


def _run_add(kernels: Kernels, n, clamp, in_place, **case) -> Arrays:
    t = flat_tensors(n=n, **case)
    y = t["b"].copy() if in_place else unwritten(n)
    kernels.mo_add(y, t["a"], y if in_place else t["b"], n, *clamp)
    return dict(y=y)


@st.composite
def poolings(draw, dilated: bool) -> dict:
    k_h, k_w = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pad_h, pad_w = draw(st.integers(0, k_h // 2)), draw(st.integers(0, k_w // 2))
    dil_h, dil_w = draw(st.sampled_from([(1, 1), (1, 1), (2, 1)])) if dilated else (1, 1)
    in_h, in_w = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    stride_h, stride_w = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    reach_h, reach_w = (k_h - 1) * dil_h + 1, (k_w - 1) * dil_w + 1
    assume(in_h + 2 * pad_h >= reach_h and in_w + 2 * pad_w >= reach_w)
    ceil_mode = draw(st.booleans())

    def out(size: int, pad: int, reach: int, stride: int) -> int:
        n = (size + 2 * pad - reach + (stride - 1 if ceil_mode else 0)) // stride + 1
        # PyTorch drops a last window that starts in the padding behind the input
        return n - 1 if ceil_mode and (n - 1) * stride >= size + pad else n

    def sees_input(o: int, size: int, k: int, stride: int, pad: int, dil: int) -> bool:
        return any(0 <= o * stride - pad + tap * dil < size for tap in range(k))

    out_h, out_w = out(in_h, pad_h, reach_h, stride_h), out(in_w, pad_w, reach_w, stride_w)
    # torch 2.13 writes outside its arrays for a dilated window that lies between the inputs
    assume(all(sees_input(o, in_h, k_h, stride_h, pad_h, dil_h) for o in range(out_h)))
    assume(all(sees_input(o, in_w, k_w, stride_w, pad_w, dil_w) for o in range(out_w)))
    window = dict(
        in_h=in_h,
        in_w=in_w,
        c=draw(st.integers(1, 35)),
        out_h=out_h,
        out_w=out_w,
        k_h=k_h,
        k_w=k_w,
        stride_h=stride_h,
        stride_w=stride_w,
        pad_t=pad_h,
        pad_l=pad_w,
        pad_b=pad_h,
        pad_r=pad_w,
        dil_h=dil_h,
        dil_w=dil_w,
    )
    case = dict(window=window, ceil_mode=ceil_mode, seed=draw(seeds))
    if not dilated:
        case |= dict(include_pad=draw(st.booleans()), divisor=draw(st.sampled_from([0, 0, 3])))
    return case


def pool_tensors(window, seed, **_) -> Arrays:
    rng, g = np.random.default_rng(seed), Window(**window)
    # few distinct values, so that equal maxima occur
    x = np.round(normal(rng, g.in_h, g.in_w, g.c) * 2)
    return dict(x=x, dy=normal(rng, g.out_h, g.out_w, g.c))


def _run_max_pool(kernels: Kernels, **case) -> Arrays:
    t, g = pool_tensors(**case), Window(**case["window"])
    y, dx = unwritten(*t["dy"].shape), unwritten(*t["x"].shape)
    without_code = unwritten(*t["dy"].shape)
    bits = next(bits for bits in (2, 4, 8) if g.k_h * g.k_w <= 1 << bits)
    code = np.full((y.size * bits + 7) // 8, 0xFF, np.uint8)
    kernels.mo_maxpool_forward(y, code, t["x"], g, bits)
    kernels.mo_maxpool_forward(without_code, None, t["x"], g, bits)
    kernels.mo_maxpool_backward(dx, t["dy"], code, g, bits)
    return dict(y=y, without_code=without_code, dx=dx, code=code)


def _run_average_pool(kernels: Kernels, **case) -> Arrays:
    t, g = pool_tensors(**case), Window(**case["window"])
    y, dx = unwritten(*t["dy"].shape), unwritten(*t["x"].shape)
    kernels.mo_avgpool_forward(y, t["x"], g, case["include_pad"], case["divisor"])
    kernels.mo_avgpool_backward(dx, t["dy"], g, case["include_pad"], case["divisor"])
    return dict(y=y, dx=dx)


adaptive = st.fixed_dictionaries(
    dict(
        seed=seeds,
        in_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        out_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
        c=st.integers(1, 35),
    )
)


def adaptive_tensors(seed, in_size, out_size, c) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(x=normal(rng, *in_size, c), dy=normal(rng, *out_size, c))


def _run_adaptive_pool(kernels: Kernels, in_size, out_size, c, seed) -> Arrays:
    t = adaptive_tensors(seed, in_size, out_size, c)
    y, dx = unwritten(*out_size, c), unwritten(*in_size, c)
    kernels.mo_adaptive_avgpool_forward(y, t["x"], *in_size, *out_size, c)
    kernels.mo_adaptive_avgpool_backward(dx, t["dy"], *in_size, *out_size, c)
    return dict(y=y, dx=dx)


@st.composite
def slices(draw) -> dict:
    rows, taps, cols = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 20))

    def indices(n: int):
        return draw(st.none() | st.lists(st.integers(0, n - 1), min_size=1, unique=True))

    return dict(
        seed=draw(seeds),
        shape=(rows, taps, cols),
        out=indices(rows),
        inside=indices(cols),
        accumulate=draw(st.booleans()),
    )


def move_tensors(seed, shape, out, inside, **_) -> Arrays:
    rng, (rows, taps, cols) = np.random.default_rng(seed), shape
    n_out, n_in = len(out) if out else rows, len(inside) if inside else cols
    return dict(base=normal(rng, rows, taps, cols), slice=normal(rng, n_out, taps, n_in))


def _run_move(kernels: Kernels, shape, out, inside, accumulate, **case) -> Arrays:
    t, (rows, taps, cols) = move_tensors(shape=shape, out=out, inside=inside, **case), shape
    n_out, _, n_in = t["slice"].shape
    index = {
        name: None if chosen is None else np.array(chosen, np.uint16)
        for name, chosen in (("out", out), ("in", inside))
    }
    full = unwritten(*shape)
    kernels.mo_assemble(
        full, t["base"], t["slice"], index["out"], n_out, index["in"], n_in, rows, taps, cols
    )
    every = np.array(inside or range(cols), np.uint16)
    gathered = unwritten(rows * taps, len(every))
    kernels.mo_gather(gathered, t["base"], every, rows * taps, cols, len(every))
    transposed = unwritten(cols, rows * taps)
    kernels.mo_transpose(transposed, t["base"], rows * taps, cols)
    # the last tap of every row, into the first of a copy
    copied = t["base"].copy()
    last = t["base"].reshape(rows, -1)[:, (taps - 1) * cols :].copy()
    kernels.mo_copy_blocks(copied, taps * cols, last, cols, rows, cols, accumulate)
    return dict(full=full, gathered=gathered, transposed=transposed, copied=copied)


losses = st.fixed_dictionaries(
    dict(
        seed=seeds,
        n=st.integers(1, 50),
        spread=st.sampled_from([0.1, 1.0, 10.0, 80.0]),
        scale=st.sampled_from([1.0, 0.25]),
    )
)


def loss_tensors(seed, n, spread, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    z = normal(rng, n) * np.float32(spread)
    return dict(z=z, target=normal(rng, n), label=int(rng.integers(n)))


def _run_loss(kernels: Kernels, n, scale, **case) -> Arrays:
    t = loss_tensors(n=n, **case)
    dz, dz_mse = t["z"].copy(), t["z"].copy()
    loss = kernels.mo_cross_entropy(dz, n, t["label"], scale)
    mse = kernels.mo_mse(dz_mse, t["target"], n, scale)
    return dict(loss=np.float32(loss), dz=dz, mse=np.float32(mse), dz_mse=dz_mse)


updates = st.fixed_dictionaries(
    dict(
        seed=seeds,
        n=st.integers(1, 70),
        weight_decay=st.sampled_from([0.0, 0.1]),
        steps=st.integers(1, 4),
    )
)


def update_tensors(seed, n, steps, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(w=normal(rng, n), g=normal(rng, steps, n))


ADAM = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-6)


def _run_update(kernels: Kernels, n, steps, weight_decay, **case) -> Arrays:
    t = update_tensors(n=n, steps=steps, **case)
    sgd, momentum, adam, counted = (t["w"].copy() for _ in range(4))
    velocity, m, v, m2, v2 = (np.zeros(n, np.float32) for _ in range(5))
    beta1, beta2 = ADAM["beta1"], ADAM["beta2"]
    for step in range(steps):
        g = np.ascontiguousarray(t["g"][step])
        kernels.mo_sgd(sgd, g, n, 0.1, weight_decay)
        kernels.mo_momentum(momentum, g, velocity, n, 0.1, 0.9, weight_decay)
        corrections = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        kernels.mo_adam(adam, g, m, v, n, *ADAM.values(), *corrections, weight_decay)
        kernels.mo_adam_counted(counted, g, m2, v2, n, *ADAM.values(), step + 1, weight_decay)
    adams = dict(adam=adam, counted=counted, m=m, v=v)
    return dict(sgd=sgd, momentum=momentum, velocity=velocity, **adams)


@st.composite
def signed_clamps(draw) -> dict:
    """Clamps from -0: y keeps the sign of what was clamped."""
    return dict(
        seed=draw(seeds),
        h=draw(st.integers(1, 5)),
        w=draw(st.integers(1, 6)),
        k=draw(st.sampled_from([1, 3])),
        in_c=draw(st.sampled_from([1, 4, 9])),
        c=draw(channels),
        hi=draw(st.sampled_from([6.0, np.inf])),
    )


def signed_tensors(seed, h, w, k, in_c, c, **_) -> Arrays:
    """Small integers: sums are exact, and many are 0."""
    rng = np.random.default_rng(seed)
    shapes = dict(
        x=(h, w, c),
        a=(h, w, c),
        x_in=(h, w, in_c),
        w_full=(c, k, k, in_c),
        w_depth=(k, k, c),
        **dict.fromkeys(["bias", "gamma", "mean", "rstd"], (c,)),
    )
    return {name: rng.integers(-3, 4, shape).astype(np.float32) for name, shape in shapes.items()}


def _run_signed_clamp(kernels: Kernels, h, w, k, in_c, c, hi, **case) -> Arrays:
    t = signed_tensors(h=h, w=w, k=k, in_c=in_c, c=c, **case)
    same = (k, k, 1, 1, k // 2, k // 2, 1, 1)
    full = Geometry(h, w, in_c, h, w, c, *same, 1)
    depthwise = Geometry(h, w, c, h, w, c, *same, c)
    y = {name: unwritten(h, w, c) for name in ("conv", "depthwise", "affine", "add", "clamp")}
    n, lo = h * w * c, -0.0
    affine = t["gamma"], t["bias"], t["mean"], t["rstd"]
    kernels.mo_conv2d_forward(y["conv"], t["x_in"], t["w_full"], t["bias"], full, lo, hi)
    kernels.mo_depthwise_forward(y["depthwise"], t["x"], t["w_depth"], None, depthwise, lo, hi)
    kernels.mo_affine_forward(y["affine"], t["x"], *affine, h * w, c, lo, hi)
    kernels.mo_add(y["add"], t["x"], t["a"], n, lo, hi)
    kernels.mo_clamp_forward(y["clamp"], t["x"], n, lo, hi)
    return y | {f"{name}_sign": np.signbit(value) for name, value in y.items()}


curves = st.fixed_dictionaries(
    dict(seed=seeds, n=st.integers(1, 300), far=st.booleans(), in_place=st.booleans())
)
NEAR = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1e-45, -1e-45, np.nextafter(np.float32(-3), 0)]
FAR = [30.0, -30.0, 87.0, -87.0, -87.00001, -88.0, 89.0, -104.0, 200.0, -200.0]


def curve_tensors(seed, n, far, **_) -> Arrays:
    """Inputs over all pieces of a curve, kinks and zeros of both signs among them."""
    rng = np.random.default_rng(seed)
    special = np.array(NEAR + FAR * far, np.float32)
    x = np.where(rng.random(n) < 0.5, rng.choice(special, n), normal(rng, n) * np.float32(3))
    return dict(x=x.astype(np.float32), dy=normal(rng, n))


def _copy_or_unwritten(array: np.ndarray, in_place: bool) -> tuple[np.ndarray, np.ndarray]:
    """(output, input) of a call that may be in place."""
    out = array.copy() if in_place else unwritten(*array.shape)
    return out, out if in_place else array


def _run_curves(kernels: Kernels, n, in_place, **case) -> Arrays:
    t, got = curve_tensors(n=n, **case), {}
    for name in ("hardswish", "hardsigmoid", "sigmoid", "silu"):
        y, x = _copy_or_unwritten(t["x"], in_place)
        dx, dy = _copy_or_unwritten(t["dy"], in_place)
        getattr(kernels, f"mo_{name}_forward")(y, x, n)
        kept = y if name == "sigmoid" else t["x"]
        if name == "hardsigmoid":
            kept = np.full((n + 7) // 8, 0xFF, np.uint8)
            kernels.mo_mask_pack(kept, t["x"], n, -3.0, 3.0)
        getattr(kernels, f"mo_{name}_backward")(dx, dy, kept, n)
        got |= {name: y, f"{name}_dx": dx}
    dx, dy = _copy_or_unwritten(t["dy"], in_place)
    mask = np.full((n + 7) // 8, 0xFF, np.uint8)
    kernels.mo_sign_pack(mask, t["x"], n)
    kernels.mo_sign_backward(dx, dy, t["x"], n)
    signs = {f"{name}_sign": np.signbit(got[name]) for name in ("hardswish", "silu")}
    return got | signs | dict(sign_mask=mask, sign_dx=dx)


products = st.fixed_dictionaries(
    dict(
        seed=seeds,
        pixels=st.integers(1, 40),
        c=channels,
        gate=st.booleans(),
        in_place=st.sampled_from(["", "a", "b"]),
    )
)


def product_tensors(seed, pixels, c, gate, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(
        a=normal(rng, pixels, c), b=normal(rng, 1 if gate else pixels, c), dy=normal(rng, pixels, c)
    )


def _run_product(kernels: Kernels, pixels, c, gate, in_place, **case) -> Arrays:
    t = product_tensors(pixels=pixels, c=c, gate=gate, **case)
    y, db = unwritten(pixels, c), unwritten(c)
    a, b = t["a"], t["b"]
    if in_place == "a":
        y = a = a.copy()
    elif in_place == "b" and not gate:
        y = b = b.copy()
    kernels.mo_mul(y, a, b, pixels, c, len(b))
    kernels.mo_mul_dgate(db, t["dy"], t["a"], pixels, c)
    return dict(y=y, db=db)


epsilons = st.sampled_from([1e-5, 1e-3, 0.1])


def spread(rng: np.random.Generator, rows: int, c: int) -> np.ndarray:
    """Neighbours of both kinds differ by 2 or more: no variance is nearly 0."""
    side = 2 * ((np.arange(rows)[:, None] + np.arange(c)) % 2) - 1
    x = 1.5 * side + rng.uniform(-0.5, 0.5, (rows, c)) + rng.standard_normal()
    return x.astype(np.float32)


batch_norms = st.fixed_dictionaries(
    dict(
        seed=seeds,
        pixels=st.integers(2, 40),
        c=channels,
        eps=epsilons,
        momentum=st.sampled_from([0.1, 0.5, 1.0]),
        clamp=clamps,
        in_place=st.booleans(),
    )
)


def batch_norm_tensors(seed, pixels, c, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(
        x=spread(rng, pixels, c),
        dy=normal(rng, pixels, c),
        gamma=normal(rng, c),
        beta=normal(rng, c),
        mean=normal(rng, c),
        var=np.abs(normal(rng, c)) + np.float32(0.1),
    )


def _run_batch_norm(kernels: Kernels, pixels, c, eps, momentum, clamp, in_place, **case) -> Arrays:
    t = batch_norm_tensors(pixels=pixels, c=c, **case)
    frozen, frozen_x = _copy_or_unwritten(t["x"], in_place)
    dx, dy = _copy_or_unwritten(t["dy"], in_place)
    y, y_x = _copy_or_unwritten(t["x"], in_place)
    stats, dgamma = unwritten(2, c), unwritten(c)
    mean, var = t["mean"].copy(), t["var"].copy()
    parameters, options = (t["gamma"], t["beta"], mean, var), (pixels, c, eps, *clamp)
    kernels.mo_batch_norm_forward(frozen, frozen_x, *parameters, None, *options)
    kernels.mo_batch_norm_forward(y, y_x, *parameters, stats, *options)
    kernels.mo_batch_norm_follow(mean, var, stats, pixels, c, eps, momentum)
    kernels.mo_batch_norm_dx(dx, dy, t["x"], t["gamma"], stats, pixels, c)
    kernels.mo_affine_dgamma(dgamma, t["dy"], t["x"], stats[0], stats[1], pixels, c, False)
    return dict(frozen=frozen, y=y, stats=stats, mean=mean, var=var, dx=dx, dgamma=dgamma)


@st.composite
def group_norms(draw) -> dict:
    groups, size = draw(st.integers(1, 5)), draw(channels)
    return dict(
        seed=draw(seeds),
        pixels=draw(st.integers(1 if size > 1 else 2, 40)),
        c=groups * size,
        groups=groups,
        eps=draw(epsilons),
        affine=draw(st.booleans()),
        clamp=draw(clamps),
        accumulate=draw(st.booleans()),
        in_place=draw(st.booleans()),
    )


def group_norm_tensors(seed, pixels, c, affine, accumulate, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(
        x=spread(rng, pixels, c),
        dy=normal(rng, pixels, c),
        gamma=normal(rng, c) if affine else None,
        beta=normal(rng, c) if affine else None,
        dgamma0=target(rng, accumulate, c),
    )


def _run_group_norm(
    kernels: Kernels, pixels, c, groups, eps, clamp, accumulate, in_place, **case
) -> Arrays:
    t = group_norm_tensors(pixels=pixels, c=c, accumulate=accumulate, **case)
    y, x = _copy_or_unwritten(t["x"], in_place)
    dx, dy = _copy_or_unwritten(t["dy"], in_place)
    unkept, stats, dgamma = unwritten(pixels, c), unwritten(2, groups), t["dgamma0"].copy()
    size, parameters = (pixels, c, groups), (t["gamma"], t["beta"])
    kernels.mo_group_norm_forward(unkept, t["x"], *parameters, None, *size, eps, *clamp)
    kernels.mo_group_norm_forward(y, x, *parameters, stats, *size, eps, *clamp)
    kernels.mo_group_norm_dx(dx, dy, t["x"], t["gamma"], stats, *size)
    kernels.mo_group_norm_dgamma(dgamma, t["dy"], t["x"], stats, *size, accumulate)
    return dict(y=y, unkept=unkept, stats=stats, dx=dx, dgamma=dgamma)


@st.composite
def fused_norms(draw) -> dict:
    k_h, k_w, c = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(channels)
    depthwise = draw(st.booleans())
    return dict(
        seed=draw(seeds),
        size=(draw(st.integers(k_h, 6)), draw(st.integers(k_w, 6))),
        kernel=(k_h, k_w),
        in_c=c if depthwise else draw(st.integers(1, 9)),
        c=c,
        depthwise=depthwise,
        bias=draw(st.booleans()),
        accumulate=draw(st.booleans()),
        cut=draw(st.integers(0, k_h if depthwise else c)),
    )


def fused_norm_tensors(seed, size, kernel, in_c, c, depthwise, bias, accumulate, **_) -> Arrays:
    rng, (k_h, k_w) = np.random.default_rng(seed), kernel
    return dict(
        x=normal(rng, *size, in_c),
        w=normal(rng, k_h, k_w, c) if depthwise else normal(rng, c, k_h, k_w, in_c),
        dy=normal(rng, size[0] - k_h + 1, size[1] - k_w + 1, c),
        bias=normal(rng, c) if bias else None,
        gamma=normal(rng, c),
        mean=normal(rng, c),
        rstd=np.abs(normal(rng, c)) + np.float32(0.1),
        dgamma0=target(rng, accumulate, c),
    )


def _run_fused_norm(kernels: Kernels, **case) -> Arrays:
    """In two parts: rows before and after the cut."""
    t, c, accumulate = fused_norm_tensors(**case), case["c"], case["accumulate"]
    (h, w), (k_h, k_w), in_c = case["size"], case["kernel"], case["in_c"]
    out_h, out_w, _ = t["dy"].shape
    groups = c if case["depthwise"] else 1
    g = Geometry(h, w, in_c, out_h, out_w, c, k_h, k_w, 1, 1, 0, 0, 1, 1, groups)
    dgamma, dw = t["dgamma0"].copy(), unwritten(*t["w"].shape)
    start = t["mean"], t["rstd"], t["bias"]
    kernels.mo_norm_dgamma_start(dgamma, t["dy"], *start, out_h * out_w, c, accumulate)
    rows = k_h if case["depthwise"] else c
    for row0, row1 in ((0, case["cut"]), (case["cut"], rows)):
        if row0 == row1:
            continue
        part, weights, scales = dw[row0:row1], t["w"][row0:row1], (t["gamma"], t["rstd"])
        if case["depthwise"]:
            kernels.mo_depthwise_dw(part, t["dy"], t["x"], g, row0, row1, False)
            taps = (row1 - row0) * k_w
            kernels.mo_norm_dw_channels(part, dgamma, weights, *scales, taps, c)
        else:
            kernels.mo_conv2d_dw(part, t["dy"], t["x"], g, row0, row1, False)
            elems = k_h * k_w * in_c
            kernels.mo_norm_dw_rows(part, dgamma, weights, *scales, row0, row1, elems)
    return dict(dgamma=dgamma, dw=dw)


standards = st.fixed_dictionaries(
    dict(seed=seeds, rows=st.integers(1, 9), row_elems=st.integers(1, 70), eps=epsilons)
)


def standard_tensors(seed, rows, row_elems, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(w=spread(rng, rows, row_elems), g=normal(rng, rows, row_elems))


def _run_standard(kernels: Kernels, rows, row_elems, eps, seed) -> Arrays:
    t = standard_tensors(seed, rows, row_elems)
    out, g = unwritten(rows, row_elems), t["g"].copy()
    kernels.mo_standardise(out, t["w"], rows, row_elems, eps)
    kernels.mo_standardise_dw(g, t["w"], rows, row_elems, eps)
    return dict(out=out, dw=g)


@st.composite
def resizes(draw) -> dict:
    """To a size, or by factors; `out` follows from them as in PyTorch."""
    in_size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    factors = draw(st.none() | st.tuples(*2 * [st.sampled_from([0.4, 1.0, 1.05, 2.0, 2.3, 3.0])]))
    if factors is None:
        out_size = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    else:
        out_size = tuple(int(n * f) for n, f in zip(in_size, factors, strict=True))
        assume(min(out_size) > 0)
    return dict(
        seed=draw(seeds),
        in_size=in_size,
        out_size=out_size,
        factors=factors,
        c=draw(channels),
        align_corners=draw(st.booleans()),
    )


def resize_tensors(seed, in_size, out_size, c, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    return dict(x=normal(rng, *in_size, c), dy=normal(rng, *out_size, c))


def resize_scales(in_size, out_size, factors, align_corners) -> list[float]:
    def scale(n_in: int, n_out: int, factor: float | None) -> float:
        if align_corners:
            return (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        return n_in / n_out if factor is None else 1 / factor

    return [scale(*sizes) for sizes in zip(in_size, out_size, factors or (None, None), strict=True)]


def _run_resize(kernels: Kernels, in_size, out_size, factors, c, align_corners, seed) -> Arrays:
    t = resize_tensors(seed, in_size, out_size, c)
    got = {}
    for name, align in (("nearest", False), ("bilinear", align_corners)):
        y, dx = unwritten(*out_size, c), unwritten(*in_size, c)
        options = *in_size, *out_size, c, *resize_scales(in_size, out_size, factors, align)
        if name == "bilinear":
            options += (align,)
        getattr(kernels, f"mo_resize_{name}_forward")(y, t["x"], *options)
        getattr(kernels, f"mo_resize_{name}_backward")(dx, t["dy"], *options)
        got |= {name: y, f"{name}_dx": dx}
    return got


cosines = st.fixed_dictionaries(
    dict(
        seed=seeds,
        features=st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 300])),
        ways=st.integers(1, 12),
        accumulate=st.booleans(),
        zero=st.sampled_from(["", "", "", "embedding", "prototype"]),
        label=st.integers(0, 11),
    )
)


def cosine_tensors(seed, features, ways, accumulate, zero, **_) -> Arrays:
    rng = np.random.default_rng(seed)
    x, prototypes = normal(rng, features), normal(rng, ways, features)
    (x if zero == "embedding" else prototypes[0])[:] *= np.float32(not zero)
    return dict(
        x=x,
        prototypes=prototypes,
        scale=normal(rng, 1) * np.float32(10),
        bias=normal(rng, 1),
        dy=normal(rng, ways),
        dx0=target(rng, accumulate, features),
    )


def _run_cosine(kernels: Kernels, features, ways, accumulate, label, **case) -> Arrays:
    t = cosine_tensors(features=features, ways=ways, accumulate=accumulate, **case)
    y, dx, prototypes = unwritten(ways), t["dx0"].copy(), t["prototypes"]
    head = prototypes, t["scale"], t["bias"]
    kernels.mo_cosine_forward(y, t["x"], *head, features, ways)
    kernels.mo_cosine_dx(dx, t["dy"], t["x"], *head[:2], features, ways, accumulate)
    sums = prototypes.copy()
    added = kernels.mo_prototype_add(sums, t["x"], label % ways, features)
    return dict(y=y, dx=dx, sums=sums, added=np.array(added))


probes = st.fixed_dictionaries(
    dict(seed=seeds, pixels=st.integers(1, 40), c=channels, accumulate=st.booleans())
)


def probe_tensors(seed, pixels, c, accumulate) -> Arrays:
    rng = np.random.default_rng(seed)
    score = np.abs(normal(rng, c)) if accumulate else unwritten(c)
    return dict(x=normal(rng, pixels, c), dy=normal(rng, pixels, c), score0=score)


def _run_probe(kernels: Kernels, pixels, c, accumulate, seed) -> Arrays:
    t = probe_tensors(seed, pixels, c, accumulate)
    score = t["score0"].copy()
    kernels.mo_fisher(score, t["dy"], t["x"], pixels, c, accumulate)
    return dict(score=score)


branches = st.fixed_dictionaries(
    dict(
        seed=seeds,
        pixels=st.integers(1, 30),
        c=channels,
        width=st.integers(1, 20),
        rho=st.floats(0.015625, 1.0, width=32),
    )
)


def branch_tensors(seed, pixels, c, width, rho) -> Arrays:
    rng = np.random.default_rng(seed)
    weights = dict(down=(width, c), down_bias=(width,), up=(c, width), up_bias=(c,))
    return dict(
        x=normal(rng, pixels, c),
        sums=np.abs(normal(rng, c)),
        **{name: normal(rng, *shape) for name, shape in weights.items()},
    )


def decided(case: dict) -> bool:
    """Whether rounding cannot tell which scores exceed rho together."""
    t = {k: v.astype(np.float64) for k, v in branch_tensors(**case).items()}
    v = t["sums"] + np.abs(t["x"]).sum(0)
    hidden = np.maximum(t["down"] @ (v / v.mean()) + t["down_bias"], 0)
    z = t["up"] @ hidden + t["up_bias"]
    scores = np.sort(np.exp(z - z.max()) / np.exp(z - z.max()).sum())[::-1]
    return bool(np.abs(scores.cumsum()[:-1] - case["rho"]).min(initial=1.0) > 1e-4)


def _run_branch(kernels: Kernels, pixels, c, width, rho, seed) -> Arrays:
    t = branch_tensors(seed, pixels, c, width, rho)
    sums, gates, hidden = t["sums"].copy(), unwritten(c), unwritten(width)
    kernels.mo_magnitudes(sums, t["x"], pixels, c)
    added = sums.copy()
    params = (t["down"], t["down_bias"], t["up"], t["up_bias"])
    kernels.mo_gates(gates, sums, hidden, *params, c, width, 0.25, rho, c)
    least = unwritten(c)
    kernels.mo_gates(least, added.copy(), hidden, *params, c, width, 0.25, rho, 1)
    return dict(sums=added, gates=gates, one=np.array(np.count_nonzero(least)))


@st.composite
def gated_layers(draw) -> dict:
    """A convolution, and which of its channels are chosen; of groups only output channels."""
    depthwise = draw(st.sampled_from([False, False, True]))
    case = draw(convolutions(depthwise))
    sides = [draw(st.booleans()) and case["geometry"]["groups"] == 1, draw(st.booleans())]
    return dict(case=case, depthwise=depthwise, sides=sides, share=draw(st.floats(0.05, 1.0)))


def gated_tensors(case, depthwise, sides, share) -> Arrays:
    """x, dy, a weight and a bias as the layer has them, gradients so far, and gates."""
    g, rng = Geometry(**case["geometry"]), np.random.default_rng(case["seed"])
    gates = {}
    for name, c, gated in (("fw", g.in_c // g.groups, sides[0]), ("bw", g.out_c, sides[1])):
        some = rng.random(c) < share
        some[rng.integers(c)] = True
        gates[name] = np.abs(normal(rng, c)) * np.float32(some) if gated else None
    n_in, n_out = (
        np.count_nonzero(gate) if gate is not None else c
        for gate, c in ((gates["fw"], g.in_c // g.groups), (gates["bw"], g.out_c))
    )
    taps = (g.k_h, g.k_w)
    shape = (*taps, g.out_c) if depthwise else (g.out_c, *taps, g.in_c // g.groups)
    return dict(
        x=normal(rng, g.in_h, g.in_w, g.in_c),
        dy=normal(rng, g.out_h, g.out_w, g.out_c),
        w=normal(rng, *shape),
        b=normal(rng, g.out_c),
        dw0=target(rng, case["accumulate"], n_out, *taps, n_in),
        db0=target(rng, case["accumulate"], n_out),
        **gates,
    )


def _run_gated(kernels: Kernels, case, **more) -> Arrays:
    t, g, accumulate = gated_tensors(case, **more), Geometry(**case["geometry"]), case["accumulate"]
    dw, db, w, b = (t[name].copy() for name in ("dw0", "db0", "w", "b"))
    n_out, k_h, k_w, n_in = dw.shape
    x, dy, fw, bw = (t[name] for name in ("x", "dy", "fw", "bw"))
    if fw is not None:
        x = unwritten(g.in_h * g.in_w, n_in)
        kernels.mo_gather_gated(x, t["x"], fw, g.in_h * g.in_w, g.in_c, n_in)
    pixels = g.out_h * g.out_w
    if bw is not None and g.groups == 1:
        dy = unwritten(pixels, n_out)
        kernels.mo_gather_gated(dy, t["dy"], bw, pixels, g.out_c, n_out)
    kernels.mo_gated_dw(dw, dy, x, fw, bw, g, n_in, n_out, accumulate)
    if bw is not None:
        kernels.mo_gated_bias_grad(db, t["dy"], bw, pixels, g.out_c, n_out, accumulate)
        kernels.mo_gated_step(b, db, None, bw, g.out_c, 1, 1, 1, 1, n_out, 1, 0.5)
    columns, taps = g.in_c // g.groups, k_h * k_w
    strides = (1, g.out_c) if more["depthwise"] else (taps * columns, columns)
    kernels.mo_gated_step(w, dw, fw, bw, g.out_c, taps, columns, *strides, n_out, n_in, 0.5)
    got = dict(dw=dw, w=w)
    return got if bw is None else got | dict(db=db, b=b)


OPS = {
    "conv2d": Op(convolutions(depthwise=False), _run_convolution("conv2d")),
    "pointwise": Op(pointwise(), _run_convolution("conv2d")),
    "depthwise": Op(convolutions(depthwise=True), _run_convolution("depthwise")),
    "affine": Op(per_channel, _run_affine),
    "activation": Op(elementwise, _run_activation),
    "add": Op(elementwise, _run_add),
    "max_pool": Op(poolings(dilated=True), _run_max_pool),
    "average_pool": Op(poolings(dilated=False), _run_average_pool),
    "adaptive_pool": Op(adaptive, _run_adaptive_pool),
    "move": Op(slices(), _run_move),
    "loss": Op(losses, _run_loss),
    "update": Op(updates, _run_update),
    "signed_clamp": Op(signed_clamps(), _run_signed_clamp),
    "curves": Op(curves, _run_curves),
    "product": Op(products, _run_product),
    "batch_norm": Op(batch_norms, _run_batch_norm),
    "group_norm": Op(group_norms(), _run_group_norm),
    "fused_norm": Op(fused_norms(), _run_fused_norm),
    "standard": Op(standards, _run_standard),
    "resize": Op(resizes(), _run_resize),
    "cosine": Op(cosines, _run_cosine),
    "probe": Op(probes, _run_probe),
    "branch": Op(branches.filter(decided), _run_branch),
    "gated": Op(gated_layers(), _run_gated),
}
