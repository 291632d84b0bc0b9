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
    sgd, momentum, adam = t["w"].copy(), t["w"].copy(), t["w"].copy()
    velocity, m, v = (np.zeros(n, np.float32) for _ in range(3))
    beta1, beta2 = ADAM["beta1"], ADAM["beta2"]
    for step in range(steps):
        g = np.ascontiguousarray(t["g"][step])
        kernels.mo_sgd(sgd, g, n, 0.1, weight_decay)
        kernels.mo_momentum(momentum, g, velocity, n, 0.1, 0.9, weight_decay)
        corrections = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        kernels.mo_adam(adam, g, m, v, n, *ADAM.values(), *corrections, weight_decay)
    return dict(sgd=sgd, momentum=momentum, velocity=velocity, adam=adam, m=m, v=v)


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
}
