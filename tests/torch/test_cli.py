"""The command line: what it takes from outside, and that it refuses early."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import modicum as mo
from modicum import arguments, cli
from modicum.errors import UsageError
from modicum.models import MODELS, DigitsNet, MobileNetV2


@pytest.fixture
def modicum(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["modicum", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of 3 classes, and the same as digits.npz beside it."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 120, (30, 8, 8), dtype=np.uint8), np.repeat(np.arange(3), 10)
    for i, label in enumerate(y):
        x[i, 2 * label : 2 * label + 2] += 130
        (root / "photos" / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(root / "photos" / f"class{label}" / f"{i:02}.png")
    np.savez(root / "images.npz", x=x[:, None], y=y)
    np.savez(root / "arrays.npz", x=(x[:, None] / 255).astype(np.float32), y=y)
    return root


@pytest.fixture
def never_a_model(monkeypatch):
    for module in (arguments, cli):
        monkeypatch.setattr(module, "make_network", lambda *a: pytest.fail("a network was made"))


# ---- compare -----------------------------------------------------------------------------------


def test_compare_trains_tells_and_goes_on(modicum, images, tmp_path):
    words = ["compare", "digits", "--data", images / "images.npz", "--methods", "last,last:n=2,"
             "mobiletl:blocks=4", "--epochs", 2, "--seeds", 2, "--out", tmp_path / "out",
             "--augment", "pad:pad=1,flip=false"]  # fmt: skip
    first = modicum(*words)
    assert first.code == 0, first.err
    assert "24 images to train, 6 to test, drawn with seed 0" in first.err
    assert "4/4 last:n=2, seed 1" in first.err and "before" not in first.err
    assert "mobiletl:blocks=4  the model has 1 inverted residual blocks" in first.out
    assert "comparison.svg" in first.out
    again = modicum(*words, "--json")
    assert again.err.count("trained before") == 4
    data = json.loads(again.out)
    assert [row["label"] for row in data["rows"]] == ["last", "last:n=2"]
    assert data["budget"]["augment"] == {
        **mo.tasks.Augment().model_dump(mode="json"), "crop": "pad", "pad": 1, "flip": False,
    }  # fmt: skip
    assert data["train"] == 24 and data["classes"] == ["0", "1", "2"]


def test_compare_takes_a_factory_with_other_outputs_and_test_images(modicum, images, tmp_path):
    (tmp_path / "net.py").write_text(
        "from modicum.models import DigitsNet\ndef make():\n    return DigitsNet(9)\n"
    )
    photos = images / "photos"
    done = modicum("compare", f"{tmp_path / 'net.py'}:make", "--input", "1x1x8x8", "--methods",
                   "last", "--data", photos, "--test", photos, "--seeds", 1, "--epochs", 1,
                   "--lr", "0.01,0.1", "--out", tmp_path / "out", "--json")  # fmt: skip
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["classes"] == ["class0", "class1", "class2"]
    assert (data["train"], data["test"], data["rates"]) == (30, 30, [0.01, 0.1])


BAD = {
    "method": (["--methods", "nope"], "no method is called 'nope'"),
    "field": (["--methods", "last:n=0"], "n: Input should be greater"),
    "unknown field": (["--methods", "last:m=1"], "m: Extra inputs"),
    "no field": (["--methods", "last:3"], "last:3 is not key=value"),
    "twice": (["--methods", "last,full,last"], "the method last is there twice"),
    "none": (["--methods", "last,,full"], "is empty"),
    "file": (["--methods", "nowhere.json"], "nowhere.json is not a method"),
    "rate": (["--lr", "fast"], "--lr fast is not a number"),
    "negative rate": (["--lr", "-1"], "lr: Input should be greater"),
    "optimizer": (["--optimizer", "lion"], "no optimizer is called 'lion'"),
    "schedule": (["--schedule", "step"], "no schedule is called 'step'"),
    "augmentation": (["--augment", "mixup"], "no augmentation is called 'mixup'"),
    "its field": (["--augment", "pad:pad=-1"], "pad: Input should be greater"),
    "its fields": (["--augment", "resized:scale=[1, 0.5]"], "scale and ratio are"),
    "board": (["--board", "abacus"], "no board is called 'abacus'"),
    "shape": (["--input", "8"], "'8' is not a shape"),
    "seeds": (["--seeds", "0"], "Invalid value"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_compare_refuses_flags_before_it_makes_a_network(
    modicum, images, tmp_path, never_a_model, words, message
):
    given = [] if "--methods" in words else ["--methods", "last"]
    done = modicum("compare", "digits", "--data", images / "images.npz", "--out", tmp_path / "out",
                   *given, *words)  # fmt: skip
    assert done.code in (1, 2) and message in done.err, done.err
    assert done.out == "" and not (tmp_path / "out").exists()


def test_compare_refuses_test_images_of_other_classes(modicum, images, tmp_path, never_a_model):
    (tmp_path / "test" / "class9").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "test" / "class9" / "0.png")
    Image.new("L", (8, 8)).save(tmp_path / "test" / "class9" / "1.png")
    done = modicum("compare", "digits", "--methods", "last", "--data", images / "photos", "--test",
                   tmp_path / "test", "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 1 and "class9" in done.err


def test_a_list_of_methods_is_parted_where_a_method_begins():
    text = (
        'full,blocks:blocks=3,norms="batch",last:n=2,explicit:params={"a": null, "b": null},x.json'
    )
    assert arguments.split_methods(text) == [
        "full",
        'blocks:blocks=3,norms="batch"',
        "last:n=2",
        'explicit:params={"a": null, "b": null}',
        "x.json",
    ]
    fields = {"blocks": 3, "norms": "batch"}
    assert arguments.parse_spec("blocks:blocks=3,norms=batch") == ("blocks", fields)
    assert arguments.parse_method("last:n=2", ["n=5"]) == mo.Last(n=5)


# ---- the other commands ------------------------------------------------------------------------


def test_a_named_model_gets_so_many_outputs_and_the_plan_remembers(modicum, images, tmp_path):
    plan = tmp_path / "plan.json"
    done = modicum("plan", "digits", "--classes", 3, "--method", "last:n=1", "--out", plan)
    assert done.code == 0, done.err
    assert mo.Plan.load(plan).graph.values["head"].shape == (1, 3)
    as_arrays = ["adapt", "digits", "--plan", plan, "--epochs", 1, "--json"]
    npz = images / "arrays.npz"
    one = modicum(*as_arrays, "--data", npz, "--test", npz)
    two = modicum(*as_arrays, "--data", images / "photos", "--test", images / "photos")
    assert one.code == two.code == 0, two.err
    a, b = json.loads(one.out), json.loads(two.out)
    assert b["losses"] == pytest.approx(a["losses"], abs=1e-6)
    assert b["accuracy_after"] == a["accuracy_after"]
    three = modicum(*as_arrays, "--data", images / "photos", "--mean", 0.5, "--std", 0.5)
    assert json.loads(three.out)["losses"] != pytest.approx(a["losses"], abs=1e-6)


def test_images_are_normalised_as_a_models_weights_want_them():
    entry = MODELS["mcunet-5fps"]
    shown = arguments.preprocess_of(entry.input, "mcunet-5fps", "", "")
    assert (shown.shape, (shown.mean, shown.std)) == (entry.input[1:], entry.normalise)
    assert arguments.preprocess_of((1, 3, 4, 5), "a.py:f", "", "").mean == (0, 0, 0)
    assert arguments.preprocess_of((1, 3, 4, 5), "mcunet-5fps", "0.25", "1,2,4").std == (1, 2, 4)


@pytest.mark.parametrize(
    "given",
    [
        ((1, 784), "mlp", "", ""),
        ((1, 1, 8, 8), None, "", ""),
        ((1, 1, 8, 8), "digits", "0.1,0.2", ""),
        ((1, 1, 8, 8), "digits", "", "0"),
        ((1, 1, 8, 8), "digits", "x", ""),
    ],
    ids=["no image", "no model", "two means", "zero", "text"],
)
def test_images_that_cannot_be_normalised_are_a_usage_error(given):
    with pytest.raises(UsageError):
        arguments.preprocess_of(*given)


def test_weights_that_leave_the_head_say_so_and_those_that_do_not_fit_say_why(tmp_path):
    small = MobileNetV2(7, 0.1).state_dict()
    torch.save(small, tmp_path / "small.pt")
    torch.save(DigitsNet(6).state_dict(), tmp_path / "digits.pt")
    (tmp_path / "net.py").write_text(
        "from modicum.models import MobileNetV2\ndef make():\n    return MobileNetV2(5, 0.1)\n"
    )
    net, said = arguments.make_network(f"{tmp_path / 'net.py'}:make", tmp_path / "small.pt", None)
    assert "classifier as initialised: 7 classes in the weights, 5 in the net" in said
    loaded = net.state_dict()
    assert all(torch.equal(v, small[k]) for k, v in loaded.items() if k.startswith("blocks"))
    assert arguments.make_network("digits", tmp_path / "digits.pt", 6)[1] == ""
    with pytest.raises(mo.InvalidInput, match="do not fit DigitsNet"):
        arguments.make_network("digits", tmp_path / "digits.pt", 4)


def test_weights_adapted_with_lite_modules_are_loaded_under_the_same_plan(modicum, tmp_path):
    (tmp_path / "net.py").write_text(
        "from modicum.models import MobileNetV2\ndef make():\n    return MobileNetV2(3, 0.1)\n"
    )
    net, plan, saved = f"{tmp_path / 'net.py'}:make", tmp_path / "plan.json", tmp_path / "a.pt"
    method = ["--method", "tinytl:drop=0.5", "--lr", 0.05]
    done = modicum("plan", net, "--input", "1x3x16x16", *method, "--out", plan)
    assert done.code == 0, done.err
    x = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
    data = tmp_path / "data.npz"
    np.savez(data, x=x, y=np.arange(6) % 3)
    words = ["adapt", net, "--plan", plan, "--data", data, "--test", data, "--epochs", 1]
    first = modicum(*words, "--save", saved, "--out", tmp_path / "first.json")
    assert first.code == 0, first.err
    again = modicum(*words, "--weights", saved, "--out", tmp_path / "again.json")
    assert again.code == 0, again.err
    before, after = (mo.Trace.load(tmp_path / f"{name}.json") for name in ("first", "again"))
    assert np.array_equal(after.logits_before, before.logits_after)
    assert not np.array_equal(before.logits_before, before.logits_after)
    shape = ["--input", "1x3x16x16", "--weights", saved]
    assert modicum("plan", net, *shape, *method).code == 0
    plain = modicum("plan", net, *shape, "--method", "last")
    assert plain.code == 1 and "--method tinytl" in plain.err


@pytest.mark.parametrize(
    "words",
    [
        ["--board", "abacus"],
        ["--method", "nope"],
        ["--set", "n"],
        ["--method", "last:n=0"],
        ["--lr", "-1"],
        ["--loss", "hinge"],
        ["--ram", "lots"],
        ["--accumulate", "0"],
        ["--input", "8"],
        ["--classes", "0"],
    ],
    ids=" ".join,
)
def test_plan_refuses_flags_before_it_makes_a_network(modicum, never_a_model, words):
    assert modicum("plan", "digits", *words).code == 2


def test_classes_go_with_a_named_model(modicum, never_a_model):
    done = modicum("plan", "net.py:make", "--input", "1x1x8x8", "--classes", 3)
    assert done.code == 2 and "--classes goes with the name of a model" in done.err


def test_the_version_is_told(modicum):
    done = modicum("--version")
    assert (done.code, done.out) == (0, f"modicum {mo.__version__}\n")


def test_help_has_no_escaped_brackets(modicum):
    for words in (["--help"], ["plan", "--help"], ["compare", "--help"]):
        done = modicum(*words)
        assert done.code == 0 and "\\[" not in done.out
    assert "[required]" in done.out
