"""Traces: what is saved is loaded, what is not a trace is refused, and where two runs part."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modicum.errors import InvalidInput
from modicum.trace import Trace, compare

WEIGHT = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
TRACE = Trace(
    "host",
    "0" * 64,
    seed=3,
    losses=[1.5, float("inf")],
    order=[1, 0],
    logits_after=np.ones((4, 2), np.float32),
    accuracy_after=0.5,
    tensors={"fc.weight": WEIGHT},
    state={"fc.weight": WEIGHT[1]},
    figures={"seconds": 0.25, "peak_rss": 4096},
)


def packed(*shape: int) -> dict[str, Any]:
    trace = Trace("", "", tensors={"x": np.zeros(shape, np.float32)})
    array: dict[str, Any] = trace.as_dict()["tensors"]["x"]
    return array


def test_a_saved_trace_is_loaded_as_it_was(tmp_path: Path) -> None:
    TRACE.save(tmp_path / "t.json")
    loaded = Trace.load(tmp_path / "t.json")
    for f in fields(Trace):
        np.testing.assert_equal(getattr(loaded, f.name), getattr(TRACE, f.name))
    assert loaded.tensors["fc.weight"].dtype == np.float32


def test_a_trace_without_anything_is_a_trace(tmp_path: Path) -> None:
    empty = Trace("torch", "0" * 64, tensors={"w": np.zeros((0, 3), np.float32)})
    empty.save(tmp_path / "t.json")
    assert Trace.load(tmp_path / "t.json").tensors["w"].shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("version", 2, "no version 1"),
        ("where", None, "where: NoneType instead of str"),
        ("plan_hash", 7, "plan_hash"),
        ("seed", "1", "seed"),
        ("losses", "12", "losses: str instead of list"),
        ("losses", [1.0, True], "losses: bool"),
        ("losses", [1.0, None], "losses"),
        ("losses", [10**400, 1.0], "too large"),
        ("order", [0, 1.5], "order: float instead of int"),
        ("order", {"0": 1}, "order"),
        ("accuracy_after", "0.5", "accuracy_after"),
        ("accuracy_before", float("nan"), "accuracy_before: nan is not finite"),
        ("logits_after", [[1.0]], "logits_after"),
        ("logits_after", {"shape": [1], "f32": "AAAA"}, "3 bytes for shape"),
        ("logits_after", {"shape": [-1], "f32": "AAAAAA=="}, "shape"),
        ("logits_after", {"shape": [1], "f32": "?"}, "base64"),
        ("logits_after", {"shape": [1]}, "not an array"),
        ("state", [], "state"),
        ("tensors", {"w": 1}, "tensors w"),
        ("tensors", {"w": packed(1, 3)}, "tensors w: shape"),
        ("tensors", {"w": packed(3, 3)}, "tensors w: shape"),
        ("tensors", {"w": packed()}, "tensors w: shape"),
        ("figures", {"ram": "9 KiB"}, "figures ram: str"),
        ("figures", {"ram": float("inf")}, "figures ram: inf is not finite"),
        ("figures", [1], "figures"),
        ("colour", "red", "has also colour"),
    ],
)
def test_a_field_that_is_not_as_it_should_be_is_named(
    tmp_path: Path, name: str, value: Any, why: str
) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**TRACE.as_dict(), name: value}))
    with pytest.raises(InvalidInput, match="is not a trace") as caught:
        Trace.load(tmp_path / "t.json")
    assert why.lower() in caught.value.details["why"][0].lower()


@pytest.mark.parametrize("name", ["version", *(f.name for f in fields(Trace))])
def test_a_field_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    data = TRACE.as_dict()
    del data[name]
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match=name):
        Trace.load(tmp_path / "t.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "\x00", "[" * 100_000])
def test_a_file_that_is_not_a_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InvalidInput, match="is not a trace"):
        Trace.load(tmp_path / "t.json")
    with pytest.raises(InvalidInput, match="is not a trace"):
        Trace.load(tmp_path / "missing.json")


def test_two_traces_part_where_a_tensor_first_differs() -> None:
    other = replace(TRACE, where="m4f", tensors={"fc.weight": WEIGHT * [[[1]], [[1.5]]]})
    assert compare(TRACE, replace(TRACE, losses=[1.5, 2.0])).first == (1, "loss")
    finite = replace(TRACE, losses=[1.5, 1.0])
    assert compare(finite, finite).bitwise
    assert compare(finite, replace(other, losses=[1.5, 1.0])).first == (1, "fc.weight")


def test_tensors_as_short_as_each_other_are_not_compared() -> None:
    short = replace(TRACE, tensors={"fc.weight": WEIGHT[:1]})
    with pytest.raises(InvalidInput, match="after every step"):
        compare(short, short)


def test_tensors_without_elements_are_the_same() -> None:
    hollow = replace(TRACE, losses=[1.5, 1.0], tensors={"w": np.zeros((2, 0), np.float32)})
    assert compare(hollow, hollow).bitwise


@pytest.mark.parametrize("shape", [(1, 3, 2), (3, 3, 2), (2, 2, 3), ()])
def test_tensors_of_other_steps_or_shapes_are_not_compared(shape: tuple[int, ...]) -> None:
    other = replace(TRACE, tensors={"fc.weight": np.zeros(shape, np.float32)})
    for a, b in ((TRACE, other), (other, TRACE)):
        with pytest.raises(InvalidInput, match=r"do not hold fc\.weight after every step"):
            compare(a, b)
