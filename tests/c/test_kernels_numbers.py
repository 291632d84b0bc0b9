"""Single values: exp, log, checksums, and what happens to numbers that are not finite."""

import ctypes
import zlib

import numpy as np
import pytest
from c.kernel_cases import examples
from c.kernels import Geometry, Window
from hypothesis import given
from hypothesis import strategies as st

BAD = [np.nan, np.inf, -np.inf]


def test_exp_is_within_a_millionth_over_its_range(kernels):
    for x in np.linspace(-87, 88.7, 20011, dtype=np.float32):
        assert kernels.mo_exp(x) == pytest.approx(np.exp(np.float64(x)), rel=1e-6, abs=0)


def test_exp_is_zero_far_below_and_infinite_far_above(kernels):
    assert kernels.mo_exp(-88.0) == kernels.mo_exp(-np.inf) == 0
    assert kernels.mo_exp(89.0) == kernels.mo_exp(np.inf) == np.inf
    assert np.isnan(kernels.mo_exp(np.nan))


@pytest.mark.parametrize("n", [1, 4, 21])
def test_sigmoid_has_the_bits_of_exp(kernels, n):
    x = np.linspace(-100, 100, 20000 // n * n, dtype=np.float32)
    x = np.concatenate([x, np.arange(-127, 128, dtype=np.float32) * np.float32(np.log(2) / 2)])
    e = np.array([kernels.mo_exp(-abs(v)) for v in x], np.float32)
    want = np.where(x < 0, e, np.float32(1)) / (1 + e)
    for i in range(0, len(x), n):  # in vectors of different widths
        part = x[i : i + n].copy()
        kernels.mo_sigmoid_forward(part, part, len(part))
        assert np.array_equal(part, want[i : i + n])


@pytest.mark.parametrize("n", [1, 5, 20])
def test_sigmoid_and_silu_outside_the_floats(kernels, n):
    def of(name: str, value: float) -> float:
        y = np.full(n, value, np.float32)
        getattr(kernels, f"mo_{name}_forward")(y, y, n)
        assert np.array_equal(y, y[:1].repeat(n), equal_nan=True)
        return y[0]

    assert (of("sigmoid", np.inf), of("sigmoid", -np.inf)) == (1, 0)
    assert (of("silu", np.inf), of("silu", 3e38)) == (np.inf, np.float32(3e38))
    assert of("silu", -3e38) == 0 and np.signbit(of("silu", -3e38))
    assert np.isnan([of(name, np.nan) for name in ("sigmoid", "silu", "hardswish")]).all()


def test_log_is_within_a_millionth_over_normal_floats(kernels):
    xs = np.geomspace(1.2e-38, 3.4e38, 20011).astype(np.float32)
    near_one = np.linspace(0.5, 2.0, 4001, dtype=np.float32)
    for x in np.concatenate([xs, near_one]):
        assert kernels.mo_log(x) == pytest.approx(np.log(np.float64(x)), rel=1e-6, abs=0)


def test_adam_corrects_for_any_number_of_updates(kernels):
    for t in (1, 2, 3, 7, 10, 100, 1023, 1024, 5000, 10**6, 2**31 - 1, 2**31, 2**32 - 1):
        w, m, v = (np.zeros(1, np.float32) for _ in range(3))
        g = np.ones(1, np.float32)
        betas = np.float64(np.float32(0.9)), np.float64(np.float32(0.999))
        kernels.mo_adam_counted(w, g, m, v, 1, 1.0, *betas, 1e-8, t, 0.0)
        c1, c2 = (-np.expm1(t * np.log(beta)) for beta in betas)
        want = -((1 - betas[0]) / c1) / np.sqrt((1 - betas[1]) / c2)
        assert w[0] == pytest.approx(want, rel=3e-6, abs=0), t


def test_log_outside_its_domain(kernels):
    assert kernels.mo_log(0.0) == kernels.mo_log(-0.0) == -np.inf
    assert kernels.mo_log(np.inf) == np.inf
    assert np.isnan(kernels.mo_log(-1.0)) and np.isnan(kernels.mo_log(np.nan))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("position", [0, 3, 6])
def test_cross_entropy_of_a_bad_logit_is_not_finite(kernels, bad, position):
    z = np.linspace(-1, 1, 7, dtype=np.float32)
    z[position] = bad
    assert not np.isfinite(kernels.mo_cross_entropy(z, 7, 3, 1.0))
    assert not np.isfinite(z).any()


@pytest.mark.parametrize("label", [-1, 7])
def test_cross_entropy_of_an_unknown_label_is_not_finite(kernels, label):
    z = np.zeros(7, np.float32)
    assert np.isnan(kernels.mo_cross_entropy(z, 7, label, 1.0))


def test_cross_entropy_survives_the_largest_logits(kernels):
    z = np.array([3e38, -3e38], np.float32)
    assert kernels.mo_cross_entropy(z, 2, 0, 1.0) == 0
    assert np.array_equal(z, [0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_passes_through_activation_pooling_and_addition(kernels, bad):
    x = np.array([1, bad, -1, 2], np.float32)
    y = np.empty_like(x)
    kernels.mo_clamp_forward(y, x, 4, 0.0, np.inf)
    assert not np.isfinite(y[1])
    kernels.mo_add(y, x, np.zeros(4, np.float32), 4, -np.inf, np.inf)
    assert not np.isfinite(y[1])
    window = Window(2, 2, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1)
    for pool in (
        lambda out: kernels.mo_maxpool_forward(out, None, x, window, 2),
        lambda out: kernels.mo_avgpool_forward(out, x, window, 0, 0),
        lambda out: kernels.mo_adaptive_avgpool_forward(out, x, 2, 2, 1, 1, 1),
    ):
        out = np.zeros(1, np.float32)
        pool(out)
        assert not np.isfinite(out[0])


@pytest.mark.parametrize("channels", [1, 4, 21, 70])
def test_a_nan_passes_through_clamped_convolutions(kernels, channels):
    g = Geometry(3, 3, channels, 3, 3, channels, 1, 1, 1, 1, 0, 0, 1, 1, 1)
    x = np.full((3, 3, channels), np.nan, np.float32)
    w = np.ones((channels, channels), np.float32)
    y = np.zeros_like(x)
    kernels.mo_conv2d_forward(y, x, w, None, g, 0.0, 6.0)
    assert np.isnan(y).all()
    y[:] = 0
    g.groups = channels
    kernels.mo_depthwise_forward(y, x, w, None, g, 0.0, 6.0)
    assert np.isnan(y).all()
    y[:] = 0
    ones = np.ones(channels, np.float32)
    kernels.mo_affine_forward(y, x, ones, ones, ones, ones, 9, channels, 0.0, 6.0)
    assert np.isnan(y).all()


def test_a_corrupt_pooling_code_writes_nowhere_else(kernels):
    window = Window(2, 2, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1)
    dx = np.full(6, 7, np.float32)
    code = np.array([0xFF], np.uint8)
    kernels.mo_maxpool_backward(dx[1:5], np.ones(1, np.float32), code, window, 8)
    assert list(dx) == [7, 0, 0, 0, 0, 7]


def test_a_window_between_the_inputs_has_no_maximum_and_no_gradient(kernels):
    window = Window(1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 0, 1, 0, 2, 1)
    y, dx, code = np.zeros(1, np.float32), np.ones(1, np.float32), np.zeros(1, np.uint8)
    kernels.mo_maxpool_forward(y, code, np.ones(1, np.float32), window, 2)
    kernels.mo_maxpool_backward(dx, np.ones(1, np.float32), code, window, 2)
    assert y[0] == -np.inf
    assert dx[0] == 0


@pytest.mark.parametrize("bad", [*BAD, 3e38])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_prototype_takes_an_embedding_whole_or_not_at_all(kernels, bad, position):
    prototypes = np.full((3, 5), 2e38, np.float32)
    before, x = prototypes.copy(), np.ones(5, np.float32)
    x[position] = bad
    assert kernels.mo_prototype_add(prototypes, x, 1, 5) == 0
    assert np.array_equal(prototypes, before)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("zero", ["embedding", "prototype"])
def test_a_cosine_of_a_bad_number_is_not_finite_and_of_a_zero_is_zero(kernels, bad, zero):
    x, c, scale, bias = (np.ones(n, np.float32) for n in (4, 4, 1, 1))
    (x if zero == "embedding" else c)[:] = 0
    y = np.zeros(1, np.float32)
    kernels.mo_cosine_forward(y, x, c, scale, bias, 4, 1)
    assert y == 1
    (x if zero == "embedding" else c)[2] = bad
    kernels.mo_cosine_forward(y, x, c, scale, bias, 4, 1)
    assert not np.isfinite(y)


@pytest.mark.parametrize("bad", BAD)
def test_all_finite_sees_one_bad_value_anywhere(kernels, bad):
    x = np.array([0.0, -1.0, 3.4e38, 1e-45, -3.4e38], np.float32)
    assert kernels.mo_all_finite(x, 5) == 1
    assert kernels.mo_all_finite(x, 0) == 1
    for i in range(5):
        y = x.copy()
        y[i] = bad
        assert kernels.mo_all_finite(y, 5) == 0
        assert kernels.mo_all_finite(y, i) == 1


@examples
@given(st.binary(max_size=200), st.integers(0, 200))
def test_crc_is_that_of_zlib_and_may_be_chained(kernels, data, cut):
    def crc(start: int, part: bytes) -> int:
        buffer = ctypes.create_string_buffer(part, len(part) + 1)
        return kernels.mo_crc32(ctypes.c_uint32(start), buffer, ctypes.c_size_t(len(part)))

    assert crc(0, data) == zlib.crc32(data)
    assert crc(crc(0, data[:cut]), data[cut:]) == zlib.crc32(data)
