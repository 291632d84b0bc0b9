"""Preprocessing against plain pillow, augmentation as drawn, batches that can be resumed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from modicum.errors import InvalidInput, UsageError
from modicum.tasks import (
    Augment,
    Position,
    Preprocess,
    Stream,
    arrays,
    batches,
    load,
    split,
    steps,
    take,
)

RNG = np.random.default_rng(0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def smooth(n: int, h: int, w: int, c: int = 3) -> np.ndarray:
    """Images that differ and are not noise."""
    small = RNG.integers(0, 256, (n, 4, 4, c), dtype=np.uint8)
    grown = [[Image.fromarray(a[..., k]).resize((w, h), 2) for k in range(c)] for a in small]
    return np.stack([np.stack([np.asarray(p) for p in planes], -1) for planes in grown])


def dataset(n: int = 10, h: int = 32, w: int = 32, c: int = 3):
    return load((smooth(n, h, w, c), np.arange(n) % 2))


def reference(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """Resize, centre crop and normalise, one after the other, in plain pillow and numpy."""
    h, w = image.shape[:2]
    across, down = (resize * w // h, resize) if h <= w else (resize, resize * h // w)
    resized = np.asarray(Image.fromarray(image).resize((across, down), Image.Resampling.BILINEAR))
    top, left = round((down - size) / 2), round((across - size) / 2)
    cut = resized[top : top + size, left : left + size].astype(np.float64) / 255
    return ((cut - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("h", "w", "resize", "size"),
    [(32, 32, None, 128), (32, 32, None, 32), (64, 64, 40, 32), (50, 75, None, 24),
     (75, 50, 40, 33), (300, 400, 147, 128), (31, 64, 128, 96)],
)  # fmt: skip
def test_evaluation_is_resize_and_centre_crop_in_pillow(h, w, resize, size):
    d = dataset(4, h, w)
    x, y = arrays(d, Preprocess(size=size, resize=resize))
    assert x.shape == (4, 3, size, size) and x.dtype == np.float32 and y.tolist() == [0, 1, 0, 1]
    wanted = np.stack([reference(d.image(i), resize or size, size) for i in range(4)])
    # Where both resize and cut, the order may round a level of 255 the other way.
    levels = 0 if h == w and resize is None else 1
    assert np.abs(x - wanted).max() < 1e-5 + levels / 255 / min(STD)


def test_a_size_can_be_oblong():
    d = dataset(2, 40, 60)
    x, _ = arrays(d, Preprocess(size=(20, 60), **PLAIN))
    # It covers 20x60: no scaling, and the middle rows.
    assert x.shape == (2, 3, 20, 60)
    assert np.abs(x[0].transpose(1, 2, 0) * 255 - d.image(0)[10:30]).max() < 1e-4


def test_grey_becomes_three_channels_and_colour_one():
    grey, colour = dataset(3, c=1), dataset(3)
    x, _ = arrays(grey, Preprocess(size=16, **PLAIN))
    assert x.shape == (3, 3, 16, 16) and (x[:, 0] == x[:, 2]).all()
    one, _ = arrays(colour, Preprocess(size=32, mean=(0.0,), std=(1.0,)))
    luma = colour.image(0) @ np.array([0.299, 0.587, 0.114]) / 255
    assert np.abs(one[0, 0] - luma).max() < 1 / 255


def test_floats_are_not_scaled_but_otherwise_treated_alike():
    images = smooth(4, 32, 32)
    bytes_ = load((images, [0, 1, 0, 1]))
    floats = load(((images / 255).astype(np.float32), [0, 1, 0, 1]))
    for augment in (None, Augment(), Augment(crop="pad")):
        a, _ = take(bytes_, Preprocess(size=48), range(4), augment=augment)
        b, _ = take(floats, Preprocess(size=48), range(4), augment=augment)
        assert np.abs(a - b).max() < 1.5 / 255 / min(STD)
    one, _ = arrays(floats, Preprocess(size=32, mean=(0.0,), std=(1.0,)))
    assert one.shape == (4, 1, 32, 32)


def test_channels_that_cannot_be_made_are_refused():
    d = load((np.zeros((2, 2, 8, 8), np.float32), [0, 1]), layout="chw")
    assert arrays(d, Preprocess(size=4, mean=(0, 0), std=(1, 1)))[0].shape == (2, 2, 4, 4)
    with pytest.raises(InvalidInput, match="image '0' has 2 channels, the preprocessing makes 3"):
        arrays(d, Preprocess(size=4))


# ---- augmentation ------------------------------------------------------------------------------


def test_half_of_the_images_are_flipped_and_each_anew_in_every_epoch():
    d = load((np.arange(16, dtype=np.uint8).reshape(1, 4, 4).repeat(400, 0), np.arange(400) % 2))
    p = Preprocess(size=4, mean=(0.0,), std=(1.0,))
    flipped = []
    for epoch in range(5):
        x, _ = take(d, p, np.arange(400), epoch=epoch, augment=Augment(crop="none"))
        flipped.append(x[:, 0, 0, 0] > x[:, 0, 0, 3])
    share = np.mean(flipped)
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / 2000)
    both = (flipped[0] & flipped[1]).mean()
    assert abs(both - 0.25) < 4 * np.sqrt(0.1875 / 400)
    x, _ = take(d, p, np.arange(9), augment=Augment(crop="none", flip=False))
    assert (x == arrays(d, p)[0][:9]).all()


def test_padding_shifts_evenly_in_both_directions():
    image = np.zeros((8, 8), np.uint8)
    image[4, 4] = 255
    d = load((np.repeat(image[None], 900, 0), np.arange(900) % 2))
    p = Preprocess(size=8, mean=(0.0,), std=(1.0,))
    x, _ = take(d, p, np.arange(900), augment=Augment(crop="pad", pad=2, flip=False))
    assert (x.sum((1, 2, 3)) == 1).all()
    at = np.argwhere(x[:, 0] == 1)[:, 1:] - 4
    found = np.array([[(at == (i, j)).all(1).sum() for j in range(-2, 3)] for i in range(-2, 3)])
    assert found.sum() == 900
    assert ((found - 36) ** 2 / 36).sum() < 52  # chi squared with 24 degrees: p = 0.001


def test_padding_beyond_the_image_leaves_black():
    d = load((np.full((50, 4, 4), 255, np.uint8), np.arange(50) % 2))
    p = Preprocess(size=4, mean=(0.0,), std=(1.0,))
    x, _ = take(d, p, np.arange(50), augment=Augment(crop="pad", pad=9))
    assert set(np.unique(x)) == {0, 1}


def test_a_resized_crop_has_the_asked_area_ratio_and_place():
    rows, columns = np.mgrid[:64, :64].astype(np.float32)
    image = np.stack([columns, rows], -1)  # a pixel says where it lies
    d = load((np.repeat(image[None], 2000, 0), np.arange(2000) % 2), layout="hwc")
    p = Preprocess(size=16, mean=(0, 0), std=(1, 1))
    augment = Augment(scale=(0.1, 0.4), ratio=(0.5, 2.0), flip=False)
    x, _ = take(d, p, np.arange(2000), augment=augment)
    # A ramp resampled to 16 has slope side / 16; its ends are cut by the image's border.
    widths = (x[:, 0, 8, 11] - x[:, 0, 8, 4]) / 7 * 16
    heights = (x[:, 1, 11, 8] - x[:, 1, 4, 8]) / 7 * 16
    share, ratio = widths * heights / 64**2, widths / heights
    assert 0.09 < share.min() < 0.11 and 0.39 < share.max() < 0.41
    assert abs(share.mean() - 0.25) < 0.01
    assert 0.49 < ratio.min() < 0.51 and 1.96 < ratio.max() < 2.02
    centre = x[:, :, 7:9, 7:9].mean((2, 3))
    assert np.abs(centre.mean(0) - 31.5).max() < 1.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 200)])
@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_tiny_and_oblong_images_pass(shape, crop):
    d = load((RNG.integers(0, 255, (30, *shape), dtype=np.uint8), np.arange(30) % 2))
    x, _ = take(d, Preprocess(size=(5, 7)), np.arange(30), augment=Augment(crop=crop))
    assert np.isfinite(x).all() and x.shape == (30, 3, 5, 7)
    assert np.isfinite(arrays(d, Preprocess(size=5, resize=9))[0]).all()


# ---- batches -------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_in_a_new_order():
    d = load(
        (np.arange(23, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2), [0, 1] * 11 + [0])
    )
    p = Preprocess(size=2, mean=(0.0,), std=(1 / 255,))
    epochs = [np.concatenate([x[:, 0, 0, 0] for x, _ in batches(d, p, 5, epoch=e)]) for e in (0, 1)]
    assert [np.sort(e).round().tolist() for e in epochs] == [list(range(23))] * 2
    assert (epochs[0] != epochs[1]).any()
    assert [len(y) for _, y in batches(d, p, 5)] == [5, 5, 5, 5, 3]
    assert [len(y) for _, y in batches(d, p, 5, drop_last=True)] == [5, 5, 5, 5]
    (_, y), *_ = batches(d, p, 5, shuffle=False)
    assert y.tolist() == d.labels[:5].tolist() and y.dtype == np.int64
    assert steps(d, 5) == 5 and steps(d, 5, drop_last=True) == 4


def test_what_an_image_becomes_does_not_depend_on_what_came_before():
    d, p, a = dataset(20), Preprocess(size=24), Augment()
    whole, _ = take(d, p, np.arange(20), seed=3, epoch=2, augment=a)
    for i in (19, 4, 0):
        alone, _ = take(d, p, [i], seed=3, epoch=2, augment=a)
        assert (alone[0] == whole[i]).all()
    assert (take(d, p, [4], seed=4, epoch=2, augment=a)[0][0] != whole[4]).any()
    assert (take(d, p, [4], seed=3, epoch=1, augment=a)[0][0] != whole[4]).any()


def test_a_stream_goes_on_where_it_was():
    d, p, a = dataset(11), Preprocess(size=16), Augment()
    stream = Stream(d, p, 4, seed=5, epochs=3, augment=a)
    seen, positions = [], [stream.at]
    for batch in stream:
        seen.append(batch)
        positions.append(stream.at)
    assert len(seen) == 9
    assert positions[3] == Position(epoch=1) and positions[-1] == Position(epoch=3)
    for k in (0, 2, 3, 4, 9):
        saved = Position.model_validate_json(positions[k].model_dump_json())
        rest = list(Stream(d, p, 4, seed=5, epochs=3, augment=a, at=saved))
        assert len(rest) == 9 - k
        for (x, y), (wanted, label) in zip(rest, seen[k:], strict=True):
            assert (x == wanted).all() and (y == label).all()


def test_these_draws_are_the_same_for_ever():
    d = load((np.arange(8, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2), [0, 1] * 4))
    p = Preprocess(size=2, mean=(0.0,), std=(1 / 255,))
    (x, _), = batches(d, p, 8, seed=7, epoch=1)  # fmt: skip
    assert x[:, 0, 0, 0].round().astype(int).tolist() == [4, 0, 6, 2, 7, 5, 1, 3]


def test_calls_that_make_no_sense_are_refused():
    d, p = dataset(4), Preprocess(size=4)
    for wrong in (
        lambda: batches(d, p, 0),
        lambda: batches(d, p, 5, drop_last=True),
        lambda: batches(d, p, 2, start=3),
        lambda: batches(d, p, 2, epoch=-1),
        lambda: take(d, p, [4]),
        lambda: take(d, p, [-1]),
    ):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(InvalidInput, match="at step 3 of an epoch of 2"):
        Stream(d, p, 2, at=Position(step=3))


@pytest.mark.parametrize(
    "fields",
    [{"size": 0}, {"size": 8, "resize": 7}, {"size": 8, "std": (1.0,)}, {"size": 8, "mean": ()},
     {"size": 8, "std": (0.0, 1.0, 1.0)}, {"size": (8, 9), "resize": 8}],
)  # fmt: skip
def test_preprocessing_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValidationError):
        Preprocess(**fields)


@pytest.mark.parametrize(
    "fields", [{"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"ratio": (2, 1)}, {"pad": -1}]
)
def test_augmentation_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValidationError):
        Augment(**fields)


@pytest.mark.slow
@pytest.mark.needs_shared("data/cifar10_train.zip")
def test_a_validation_set_of_cifar_as_batches(shared):
    train, held_out = split(load(shared("data/cifar10_train.zip")), (0.9, 0.1), seed=1)
    assert held_out.counts.tolist() == [60] * 10
    x, y = next(batches(train, Preprocess(size=128), 8, augment=Augment()))
    assert x.shape == (8, 3, 128, 128) and y.shape == (8,)
    whole, _ = arrays(held_out, Preprocess(size=32))
    assert abs(whole.mean()) < 0.3 and 0.8 < whole.std() < 1.3  # what mean and std are for
