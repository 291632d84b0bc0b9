"""Map-style datasets of torch, and preprocessing against torch's own resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from modicum.errors import InvalidInput
from modicum.tasks import Augment, Preprocess, arrays, batches, check, load, take


class Items(Dataset):
    def __init__(self, items, **more):
        self.items = items
        self.reads = 0
        vars(self).update(more)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.reads += 1
        return self.items[i]


RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
KINDS = {
    "pillow": Image.fromarray,
    "array": lambda a: a,
    "array, channels first": lambda a: a.transpose(2, 0, 1),
    "tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1),
    "floats": lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_of_any_kind_of_image_is_read(kind):
    d = load(Items([(KINDS[kind](a), k % 2) for k, a in enumerate(BYTES)]))
    check(d)
    assert d.labels.tolist() == [0, 1, 0, 1] and d.classes == ("0", "1")
    for i, image in enumerate(BYTES):
        scale = 255 if kind == "floats" else 1
        assert np.abs(d.image(i) * np.float32(scale) - image).max() < 1e-4


def test_an_image_is_read_from_the_dataset_once():
    data = Items([(a, k % 2) for k, a in enumerate(BYTES)])
    d = load(data)
    for _ in range(3):
        list(batches(d, Preprocess(size=8), 2))
    assert data.reads == 4


def test_targets_and_classes_of_the_dataset_are_used_and_verified():
    items = [(a, k % 2) for k, a in enumerate(BYTES)]
    data = Items(items, targets=torch.tensor([0, 1, 0, 1]), classes=["up", "down"])
    d = load(data)
    assert data.reads == 0 and d.classes == ("up", "down")
    check(d)
    with pytest.raises(InvalidInput, match="item 2 of the dataset has label 0 now and 1 before"):
        check(load(Items(items, targets=[0, 1, 1, 1])))
    with pytest.raises(InvalidInput, match="4 images but 3 labels"):
        load(Items(items, targets=[0, 1, 1]))
    with pytest.raises(InvalidInput, match="labels must be whole numbers below 1"):
        load(Items(items, classes=["up"]))
    with pytest.raises(InvalidInput, match="classes of the given classes and of"):
        load(data, classes=("down", "up"))


def test_a_tensor_dataset_and_a_pair_of_tensors_agree():
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    a, b = load(TensorDataset(x, y)), load((x, y))
    assert (a.labels == b.labels).all()
    p = Preprocess(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert (arrays(a, p)[0] == arrays(b, p)[0]).all()
    assert np.abs(arrays(a, p)[0] - x.numpy()).max() < 1e-6


def fails():
    raise RuntimeError("disk on fire")


class Broken(Items):
    def __getitem__(self, i):
        return fails()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (Items([]), "has no items"),
        (Items([(BYTES[0], 0.5)]), "label that is not a whole number"),
        (Items([(BYTES[0], torch.tensor([0, 1]))]), "label that is not a whole number"),
        (Items([BYTES[0]]), "is not a pair"),
        (Items([("text", 0)]), "the image of item 0 of the dataset has"),
        (Items([(torch.full((3, 4, 4), float("nan")), 0)]), "not finite"),
        (Items([(torch.zeros(3), 0)]), "has shape"),
        (Items([(BYTES[0], -1)]), "whole numbers"),
        (Broken([1]), "item 0 of the dataset cannot be read"),
        (object(), "cannot load a object"),
        (3, "cannot load a int"),
    ],
)
def test_what_is_no_dataset_of_labelled_images_is_refused(data, match):
    with pytest.raises(InvalidInput, match=match):
        load(data)


@pytest.mark.parametrize(("side", "size"), [(32, 128), (64, 48), (105, 28)])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_evaluation_agrees_with_torch(side, size, how):
    # Away from 0 and 255, at which pillow cuts off what a bicubic filter overshoots.
    x = RNG.integers(100, 150, (2, 3, side, side), dtype=np.uint8)
    p = Preprocess(size=size, interpolation=how, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    made, _ = arrays(load((x, [0, 1])), p)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(x).float(), size=(size, size), mode=how, antialias=True
    )
    # pillow rounds to levels of 255 after either direction.
    assert np.abs(made - wanted.numpy()).max() < 2.0
    floats, _ = arrays(
        load((x.astype(np.float32), [0, 1])), p.model_copy(update={"std": (1.0,) * 3})
    )
    assert np.abs(floats - wanted.numpy()).max() < 5e-3


def test_a_batch_becomes_a_tensor_without_a_copy():
    d = load((BYTES, [0, 1, 0, 1]))
    x, y = take(d, Preprocess(size=8), range(4), augment=Augment())
    assert torch.from_numpy(x).is_contiguous() and torch.from_numpy(y).dtype == torch.int64
