"""Log-mel features: the equation, computed slowly; tones where they belong; broken files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modicum.errors import InvalidInput
from modicum.logmel import LogMel, spoken
from modicum.tasks import Preprocess, take


def slowly(config: LogMel, x: np.ndarray) -> np.ndarray:
    """The features of a recording of just `length` samples, sum by sum, in double."""

    def mel(f):
        return 2595 * math.log10(1 + f / 700)

    tops = np.linspace(mel(config.fmin), mel(config.fmax), config.mels + 2)
    edges = [700 * (10 ** (m / 2595) - 1) for m in tops]
    out = np.zeros(config.shape)
    n = np.arange(config.frame)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / config.frame)
    for t in range(config.shape[0]):
        frame = x[t * config.hop : t * config.hop + config.frame] * window
        for m in range(config.mels):
            low, mid, high = edges[m : m + 3]
            energy = 0.0
            for k in range(config.n_fft // 2 + 1):
                f = k * config.rate / config.n_fft
                if low < f < high:
                    height = (f - low) / (mid - low) if f <= mid else (high - f) / (high - mid)
                    bin_ = np.sum(frame * np.exp(-2j * np.pi * k * n / config.n_fft))
                    energy += height * abs(bin_) ** 2
            out[t, m] = math.log(max(energy, config.floor))
    return out


SMALL = LogMel(frame=60, hop=25, n_fft=64, length=135, mels=6, level="none")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([1e-3, 1.0]))
def test_features_are_those_of_a_slow_computation(seed, loud):
    wave = np.random.default_rng(seed).normal(size=SMALL.length) * loud
    made = SMALL.features(wave).numpy()
    assert made.shape == SMALL.shape == (4, 6) and made.dtype == np.float32
    np.testing.assert_allclose(made, slowly(SMALL, wave), atol=2e-3)


@pytest.mark.parametrize("hertz", [200.0, 440.0, 1000.0, 2500.0, 3500.0])
def test_the_energy_of_a_tone_is_in_the_band_around_it(hertz):
    config = LogMel()
    tone = np.sin(2 * np.pi * hertz * np.arange(config.length) / config.rate)
    band = config.features(tone).mean(0).argmax().item()
    tops = config.filters.argmax(1) * config.rate / config.n_fft
    width = np.gradient(tops)[band]
    assert abs(tops[band] - hertz) <= width


def test_int16_and_floats_and_tensors_are_the_same_wave():
    wave = np.random.default_rng(0).integers(-3000, 3000, 5216).astype(np.int16)
    config = LogMel(level="none")
    floats = wave.astype(np.float32) / 32768
    for other in (floats, floats.astype(np.float64), torch.from_numpy(floats)):
        assert torch.equal(config.features(wave), config.features(other))


def test_loudness_is_the_same_for_all_where_the_peak_is_the_level():
    wave = np.random.default_rng(0).integers(-300, 300, 4000).astype(np.int16)
    quiet, loud = (LogMel().features(w) for w in (wave, wave * 100))
    torch.testing.assert_close(quiet, loud, atol=1e-4, rtol=0)
    quiet, loud = (LogMel(level="none").features(w) for w in (wave, wave * 100))
    assert (loud - quiet).mean() > 5


@pytest.mark.parametrize("level", ["peak", "none"])
def test_silence_is_the_floor(level):
    made = LogMel(level=level).features(np.zeros(100, np.int16))
    assert (made == math.log(np.float32(1e-3))).all()


def test_short_recordings_lie_in_the_middle_and_long_ones_lose_both_ends():
    config = SMALL
    wave = np.random.default_rng(0).normal(size=config.length)
    padded = np.concatenate([np.zeros(20), wave[:95], np.zeros(20)])
    assert torch.equal(config.features(wave[:95]), config.features(padded))
    longer = np.concatenate([np.ones(7), wave, np.ones(7)])
    assert torch.equal(config.features(wave), config.features(longer))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"fmax": 5000}, "rate / 2"),
        ({"fmin": 3900}, "fmin < fmax"),
        ({"frame": 300}, "frame <= n_fft"),
        ({"length": 100}, "frame <= length"),
        ({"mels": 200}, "fewer mels"),
        ({"mean": (0.0,) * 20}, "mean and std"),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 3}, "mean and std"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        LogMel(**fields)


@pytest.mark.parametrize(
    "wave", [np.zeros(0, np.int16), np.zeros((2, 8)), np.zeros(8, np.int32), np.array([0, np.nan])]
)
def test_what_is_not_a_recording_is_refused(wave):
    with pytest.raises(InvalidInput):
        LogMel().features(wave)


@pytest.fixture
def recordings(tmp_path):
    rng = np.random.default_rng(0)
    waves = {
        f"{word}_{speaker}_{k}": (rng.normal(size=3000 + 500 * k) * 1000).astype(np.int16)
        for word in ("yes", "no")
        for speaker in ("anna", "boli")
        for k in range(3)
    }
    np.savez(tmp_path / "words.npz", **waves)
    return tmp_path / "words.npz", waves


def test_a_file_of_recordings_has_words_as_classes_and_speakers_as_groups(recordings):
    path, waves = recordings
    d = spoken(path, LogMel())
    assert d.classes == ("no", "yes") and sorted(set(d.group)) == ["anna", "boli"]
    assert d.names == tuple(sorted(waves)) and d.counts.tolist() == [6, 6]
    x, y = take(d, Preprocess(size=LogMel().shape, mean=(0.0,), std=(1.0,)), [7])
    assert x.shape == (1, 1, 32, 20) and d.classes[y[0]] == d.names[7].split("_")[0]
    np.testing.assert_array_equal(x[0, 0], LogMel().features(waves[d.names[7]]).numpy())


def test_constants_come_from_the_recordings_that_they_are_fitted_to(recordings):
    path, _ = recordings
    raw = spoken(path, LogMel())
    anna = np.array(raw.group) == "anna"
    fitted = LogMel().fitted(raw.subset(anna))
    d = spoken(path, fitted)
    x = np.stack([d.image(i)[..., 0] for i in np.flatnonzero(anna)])
    np.testing.assert_allclose(x.mean((0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(x.std((0, 1)), 1, atol=1e-4)
    with pytest.raises(InvalidInput, match="normalised"):
        fitted.fitted(d)
    with pytest.raises(InvalidInput, match="no recordings"):
        LogMel().fitted(raw.subset([]))
    with pytest.raises(InvalidInput, match="shape"):
        LogMel(mels=10).fitted(raw)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "no recordings"),
        ({"hello": np.zeros(9, np.int16)}, "WORD_SPEAKER_NUMBER"),
        ({"a_b_c": np.zeros(9, np.int16)}, "WORD_SPEAKER_NUMBER"),
        ({"a_b_0": np.zeros((3, 3), np.int16)}, "recording 'a_b_0'"),
        ({"a_b_0": np.array([None])}, "cannot|can be read"),
    ],
)
def test_a_file_of_something_else_says_what_is_wrong(tmp_path, arrays, says):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InvalidInput, match=says):
        spoken(tmp_path / "x.npz", LogMel())


def test_a_file_that_is_missing_or_broken_is_refused(tmp_path, recordings):
    with pytest.raises(InvalidInput, match="not a file"):
        spoken(tmp_path / "none.npz", LogMel())
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(InvalidInput, match="can be read"):
        spoken(tmp_path / "text.npz", LogMel())
    whole = recordings[0].read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match="can be read"):
        spoken(tmp_path / "cut.npz", LogMel())


@pytest.mark.slow
@pytest.mark.needs_shared("data/spoken_digits.npz")
def test_the_spoken_digits(shared):
    d = spoken(shared("data/spoken_digits.npz"), LogMel())
    assert d.counts.tolist() == [300] * 10 and len(set(d.group)) == 6
