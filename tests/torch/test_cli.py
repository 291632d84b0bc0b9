"""The command line: what it takes from outside, and that it refuses early."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import modicum as mo
from modicum import arguments, cli
from modicum.errors import UsageError
from modicum.models import MODELS, DigitsNet, MobileNetV2


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


# ---- few-shot tasks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    """net.py; base.npz, images of 8 classes; support.npz and query.npz, arrays of 3 others."""
    root = tmp_path_factory.mktemp("shots")
    (root / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3),\n"
        "        nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6))\n"
    )
    rng = np.random.default_rng(0)
    base = rng.integers(0, 160, (11, 8, 8))

    def pictures(classes: range, each: int):
        y = np.repeat(np.arange(len(classes)), each)
        return base[y + classes[0]] + rng.integers(0, 96, (len(y), 8, 8)), y

    x, y = pictures(range(8), 8)
    np.savez(root / "base.npz", x=x.astype(np.uint8), y=y)
    for name, each in (("support", 5), ("query", 8)):
        x, y = pictures(range(8, 11), each)
        np.savez(root / f"{name}.npz", x=(x[:, None] / 255).astype(np.float32), y=y)
    for k in range(3):
        (root / "photos" / f"c{k}").mkdir(parents=True)
        for i in range(5):
            picture = np.round(np.load(root / "support.npz")["x"][5 * k + i, 0] * 255)
            Image.fromarray(picture.astype(np.uint8)).save(root / "photos" / f"c{k}" / f"{i}.png")
    return root


SHAPE = ["--input", "1x1x8x8"]
LEAN = ["--method", "tinytrain:ram=64KiB,macs_fraction=0.5", "--optimizer", "adam", "--lr", 0.01]


def test_the_whole_road_of_a_few_shot_task(modicum, shots, tmp_path):
    net, plan, saved = f"{shots / 'net.py'}:make", tmp_path / "plan.json", tmp_path / "adapted.pt"
    meta = tmp_path / "meta"
    words = ["metatrain", net, *SHAPE, "--data", shots / "base.npz", "--ways", "3-5", "--shots", 2,
             "--queries", 3, "--epochs", 2, "--episodes", 6, "--rate", 0.01, "--warmup", 1,
             "--out", meta, "--json"]  # fmt: skip
    first = modicum(*words)
    assert first.code == 0 and "epoch 2/2: loss" in first.err, first.err
    trace = json.loads(first.out)
    assert len(trace["losses"]) == 2 and trace["best"] == 1
    again = modicum(*words)
    assert "goes on after epoch 2" in again.err and json.loads(again.out) == trace
    weights = meta / "weights.pt"
    assert len(torch.load(weights, weights_only=True)["head.prototypes"]) == 5

    few = ["--ways", 3, "--samples", shots / "support.npz", "--weights", weights]
    done = modicum("plan", net, *SHAPE, *LEAN, *few, "--out", plan)
    assert done.code == 0 and "as initialised" not in done.err, done.err
    made = mo.Plan.load(plan)
    assert made.graph.values[made.graph.output].shape == (1, 3)
    adapted = modicum("adapt", net, "--plan", plan, "--weights", weights, "--data",
                      shots / "support.npz", "--test", shots / "query.npz", "--iterations", 7,
                      "--prototypes", "fixed", "--tune", "translate=0.25", "--save", saved,
                      "--out", tmp_path / "trace.json")  # fmt: skip
    assert adapted.code == 0 and "7 steps" in adapted.out, adapted.err
    after = mo.Trace.load(tmp_path / "trace.json")
    assert after.accuracy_before > 0.5 and len(after.losses) == 7

    loaded = arguments.model_of_plan(made, net, saved)
    x, _y = (np.load(shots / "query.npz")[k] for k in "xy")
    with torch.no_grad():
        logits = loaded(torch.from_numpy(x)).numpy()
    assert logits == pytest.approx(after.logits_after, abs=1e-4)
    done = modicum("emit", net, "--plan", plan, "--weights", saved, "--out", tmp_path / "c")
    assert done.code == 0, done.err


def test_meta_trained_weights_go_into_plain_and_few_shot_models_of_any_ways(
    modicum, shots, tmp_path
):
    net, weights = f"{shots / 'net.py'}:make", tmp_path / "w.pt"
    trained = arguments.make_network(net, None, None, ways=5)[0]
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(1)
        trained.head.prototypes.normal_()
        trained.head.scale.fill_(3.0)
    torch.save(trained.state_dict(), weights)
    backbone = trained.backbone.state_dict()

    same, said = arguments.make_network(net, weights, None, ways=5)
    assert said == "" and torch.equal(same.head.prototypes, trained.head.prototypes)
    other, said = arguments.make_network(net, weights, None, ways=7)
    assert said == "prototypes as initialised: 5 classes in the weights, 7 in the net"
    assert other.head.prototypes.shape == (7, 32) and float(other.head.scale) == 3.0
    plain, said = arguments.make_network(net, weights, None)
    assert said == "6 as initialised: the weights are of a few-shot model"
    fresh = arguments.make_network(net, None, None)[0]
    assert torch.equal(plain[6].weight, fresh[6].weight)
    for into in (same.backbone, other.backbone, plain):
        assert all(torch.equal(into.state_dict()[k], v) for k, v in backbone.items())

    torch.save(fresh.state_dict(), weights)  # and a classifier's into a few-shot model
    wrapped, said = arguments.make_network(net, weights, None, ways=2)
    assert said == "" and torch.equal(wrapped.backbone[0].weight, fresh[0].weight)
    assert not wrapped.head.prototypes.any()
    del backbone["0.bias"]
    state = {f"backbone.{k}": v for k, v in backbone.items()}
    state |= {f"head.{k}": v for k, v in trained.head.state_dict().items()}
    torch.save(state, weights)
    for ways in (None, 5):
        with pytest.raises(mo.InvalidInput, match=r"0\.bias"):
            arguments.make_network(net, weights, None, ways=ways)


def test_a_factory_may_make_a_few_shot_model_itself(modicum, shots, tmp_path):
    (tmp_path / "few.py").write_text(
        f"import sys; sys.path.insert(0, {str(shots)!r})\n"
        "import net, modicum as mo\n"
        "def make():\n    return mo.few_shot(net.make(), 4, scale=5.0)\n"
    )
    few = f"{tmp_path / 'few.py'}:make"
    assert arguments.make_network(few, None, None)[0].head.prototypes.shape == (4, 32)
    made = arguments.make_network(few, None, None, ways=3)[0]
    assert made.head.prototypes.shape == (3, 32) and float(made.head.scale) == 5.0
    torch.save(made.state_dict(), tmp_path / "w.pt")
    again, said = arguments.make_network(few, tmp_path / "w.pt", None)
    assert said == "" and again.head.prototypes.shape == (4, 32)


def test_lite_modules_of_a_few_shot_model_are_loaded_into_it_and_into_a_plain_one(tmp_path):
    (tmp_path / "mobile.py").write_text(
        "from modicum.models import MobileNetV2\ndef make():\n    return MobileNetV2(3, 0.1)\n"
    )
    net, weights = f"{tmp_path / 'mobile.py'}:make", tmp_path / "w.pt"

    def prepare(model):
        return mo.prepare_model(model.eval(), torch.zeros(1, 3, 16, 16), mo.TinyTL(drop=0.9))

    first = arguments.make_network(net, None, None, prepare, 2)[0]
    lite = [k for k in first.state_dict() if ".lite." in k]
    assert lite and all(k.startswith("backbone.") for k in lite)
    torch.save({k: v + 1 for k, v in first.state_dict().items()}, weights)
    again = arguments.make_network(net, weights, None, prepare, 2)[0]
    plain = arguments.make_network(net, weights, None, prepare)[0]
    for k in lite:
        assert torch.equal(again.state_dict()[k], first.state_dict()[k] + 1)
        assert torch.equal(plain.state_dict()[k.removeprefix("backbone.")], again.state_dict()[k])


def test_samples_of_images_and_of_arrays_make_the_same_plan(modicum, shots, tmp_path):
    net = f"{shots / 'net.py'}:make"
    plans = []
    for samples in ("support.npz", "photos"):
        plan = tmp_path / f"{samples}.json"
        done = modicum("plan", net, *SHAPE, *LEAN, "--ways", 3, "--samples", shots / samples,
                       "--out", plan)  # fmt: skip
        assert done.code == 0, done.err
        plans.append(mo.Plan.load(plan))
    assert plans[0] == plans[1]
    done = modicum("plan", net, *SHAPE, *LEAN, "--samples", shots / "support.npz")
    assert done.code == 0 and "weight, bias" in done.out, done.err  # of a linear head


def test_a_method_that_looks_at_samples_asks_for_them(modicum, shots):
    net = f"{shots / 'net.py'}:make"
    done = modicum("plan", net, *SHAPE, *LEAN)
    assert done.code == 2 and "TinyTrain has to see samples" in done.err
    assert "--samples FILE" in done.err
    sparse = ["--method", "sparse_update", "--set", "biases=1", "--set", 'weights={"0": 0.5}']
    done = modicum("plan", net, *SHAPE, *sparse)
    assert done.code == 0, done.err
    done = modicum("plan", net, *SHAPE, "--method", "last", "--samples", shots / "support.npz")
    assert done.code == 2 and "last looks at no samples" in done.err
    wrong = modicum("plan", net, *SHAPE, *LEAN, "--ways", 2, "--samples", shots / "support.npz")
    assert wrong.code == 1 and "labels must be whole numbers from 0 to 1" in wrong.err
    missing = modicum("plan", net, *SHAPE, *LEAN, "--ways", 4, "--samples", shots / "support.npz")
    assert missing.code == 2 and "does not have samples of each of 4 classes" in missing.err
    both = modicum("plan", "digits", "--classes", 3, "--ways", 3)
    assert both.code == 2 and "--ways alone" in both.err


def test_flags_that_do_not_go_with_a_plan_are_refused(modicum, shots, tmp_path):
    net, plan = f"{shots / 'net.py'}:make", tmp_path / "plan.json"
    words = ["adapt", net, "--plan", plan, "--data", shots / "support.npz"]
    modicum("plan", net, *SHAPE, "--method", "last", "--ways", 3, "--out", plan)
    for more in (["--epochs", 3], ["--schedule", "cosine"], ["--record"]):
        done = modicum(*words, *more)
        assert done.code == 2 and f"{more[0]} does not go with a plan for few-shot" in done.err
    modicum("plan", net, *SHAPE, "--method", "last", "--out", plan)
    for more in (["--iterations", 3], ["--prototypes", "fixed"], ["--tune", "translate=0.2"]):
        done = modicum(*words, *more)
        assert done.code == 2 and f"{more[0]} does not go with a plan without few-shot" in done.err


def test_compare_on_tasks_says_what_it_chose_rates_on_and_goes_on(modicum, shots, tmp_path):
    net, out = f"{shots / 'net.py'}:make", tmp_path / "out"
    weights = tmp_path / "w.pt"
    torch.save(arguments.make_network(net, None, None, ways=2)[0].state_dict(), weights)
    words = ["compare", net, *SHAPE, "--tasks", 2, "--data", shots / "base.npz", "--methods",
             "none,last,tinytrain:ram=64KiB,macs_fraction=0.5,transductive", "--lr", "0.01,0.1",
             "--ways", "2-3", "--shots", 2, "--queries", 3, "--iterations", 2,
             "--validation-tasks", 2, "--out", out]  # fmt: skip
    first = modicum(*words, "--meta", weights)
    assert first.code == 0, first.err
    assert "rates are chosen on 2 of the 8 classes of" in first.err
    assert "the tasks are of the others" in first.err
    assert "2 tasks of base: 2 to 3 ways, 2 shots, 3 queries" in first.out
    assert "lr: the best on 2 tasks of base (2 classes held back)" in first.out
    assert "meta-trained: transductive" in first.out and "less as given" in first.out
    again = modicum(*words, "--meta", weights, "--json")
    assert "base 0" in first.err and "base 0" not in again.err  # nothing was learned
    data = json.loads(again.out)
    assert [r["label"] for r in data["rows"][:4]] == [
        "none", "last", "tinytrain:ram=64KiB,macs_fraction=0.5", "transductive",
    ]  # fmt: skip
    transductive = data["rows"][3]
    assert (transductive["tune"]["entropy"], transductive["batch"]) == (1.0, 100)
    assert data["rows"][1]["tune"]["iterations"] == 2 and data["optimizer"]["kind"] == "adam"
    assert {p.name for p in out.iterdir()} >= {"tasks.json", "tasks.txt", "tasks.svg", "tasks.png"}


def test_compare_on_tasks_draws_various_shots_and_takes_all_methods_by_default(
    modicum, shots, tmp_path
):
    net = f"{shots / 'net.py'}:make"
    words = ["compare", net, *SHAPE, "--tasks", 1, "--data", shots / "base.npz", "--ways", "3-5",
             "--queries", 2, "--iterations", 1, "--out", tmp_path / "out", "--json"]  # fmt: skip
    done = modicum(*words, "--shots", "various")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["rule"]["kind"] == "various" and data["rule"]["ways"] == [3, 5]
    known = {r["label"] for r in data["rows"]} | {k.partition(": ")[2] for k in data["left_out"]}
    assert known == set(arguments.split_methods(arguments.TASK_METHODS))
    assert {"none", "last", "full", "transductive"} <= {r["label"] for r in data["rows"]}
    named = arguments.task_methods("mcunet-5fps")
    assert named.endswith("transductive,sparse_update:scheme=mcunet-99kb")
    for odd in ("many", "\u00b2", "-1", "1.5"):  # a raised 2 is a digit and no number
        wrong = modicum(*words, f"--shots={odd}")
        assert wrong.code == 2 and "neither a number nor 'various'" in wrong.out
    for odd in (["--ways", "3-600", "--shots", "various"], ["--ways", "\u00b2"], ["--shots", "0"]):
        assert modicum(*words, *odd).code == 2
    rules = modicum("compare", net, *SHAPE, "--rules", "anil", "--data", shots / "base.npz",
                    "--test", shots / "base.npz", "--ways", 3, "--shots", "various", "--out",
                    tmp_path / "rules")  # fmt: skip
    assert rules.code == 2 and "--shots various is not a number" in rules.err


def test_compare_on_tasks_takes_more_images_and_other_validation_images(modicum, shots, tmp_path):
    net = f"{shots / 'net.py'}:make"
    done = modicum("compare", net, *SHAPE, "--tasks", 1, "--data", shots / "photos", "--test",
                   shots / "base.npz", "--test", shots / "support.npz", "--methods", "last",
                   "--lr", "0.01,0.1", "--validation", shots / "query.npz", "--ways", 2, "--shots",
                   2, "--queries", 2, "--iterations", 1, "--validation-tasks", 1, "--json",
                   "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert list(data["rows"][0]["accuracies"]) == ["photos", "base", "support"]
    assert data["validation"] == ["query"] and "rates are chosen" not in done.err


BAD_TASKS = {
    "epochs": (["--epochs", 3], "--epochs goes without --tasks"),
    "board": (["--board", "nano33ble"], "--board goes without --tasks"),
    "ways": (["--ways", "a-b"], "--ways a-b is neither a number nor a range"),
    "order": (["--ways", "5-2"], "ways are (fewest, most)"),
    "one way": (["--ways", 1], "greater than or equal to 2"),
    "prototypes": (["--prototypes", "still"], "prototypes: Input should be 'moving'"),
    "tune": (["--tune", "speed=3"], "speed: Extra inputs"),
    "rate": (["--lr", "0"], "rates"),
    "twice": (["--methods", "none,none"], "is there twice"),
    "classes": (["--ways", 5, "--lr", "0.1,0.2"], "has 8 classes, too few to hold 5 back"),
    "none's fields": (["--methods", "none:n=1"], "no method is called 'none'"),
    "the same images": (["--test", "{base}"], "is there twice"),
}


@pytest.mark.parametrize(("words", "message"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_compare_on_tasks_refuses_flags_before_it_makes_a_network(
    modicum, shots, tmp_path, never_a_model, words, message
):
    words = [str(w).format(base=shots / "base.npz") for w in words]
    given = [] if "--methods" in words else ["--methods", "last"]
    done = modicum("compare", "digits", "--tasks", 2, "--data", shots / "base.npz", "--out",
                   tmp_path / "out", *given, *words)  # fmt: skip
    assert done.code == 2 and message in done.err, done.err
    assert done.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--ways", "--iterations", "--validation-tasks"])
def test_flags_of_tasks_go_with_tasks(modicum, shots, tmp_path, never_a_model, flag):
    done = modicum("compare", "digits", "--data", shots / "base.npz", "--methods", "last", "--out",
                   tmp_path / "out", flag, 3)  # fmt: skip
    assert done.code == 2 and f"{flag} goes with --tasks" in done.err
    two = modicum("compare", "digits", "--data", shots / "base.npz", "--methods", "last", "--out",
                  tmp_path / "out", "--test", "a", "--test", "b")  # fmt: skip
    assert two.code == 2 and "several --test go with --tasks" in two.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--warmup", 100], "epochs of warm-up do not fit"),
        (["--ways", "5-"], "neither a number nor a range"),
        (["--rule", "protonet:norms=group"], "norms: Input should be 'frozen'"),
        (["--rule", "maml:steps=0"], "steps: Input should be greater"),
        (["--rule", "odd"], "no rule is called 'odd'"),
        (["--tasks", 3, "--episodes", 10], "10 episodes are not whole updates of 3"),
        (["--augment", "mixup"], "no augmentation is called 'mixup'"),
        (["--rate", "-1"], "rate: Input should be greater"),
        (["--input", "1x8"], "which is no image"),
    ],
)
def test_metatrain_refuses_flags_before_it_makes_a_network(
    modicum, shots, tmp_path, never_a_model, words, message
):
    done = modicum("metatrain", "digits", "--data", shots / "base.npz", "--out", tmp_path / "out",
                   *words)  # fmt: skip
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", ["none", "both"])
def test_what_a_gradient_rule_has_learned_is_planned_adapted_and_emitted(
    modicum, shots, tmp_path, channels
):
    """With p-Meta's attention in the weights, and without."""
    meta, plan = tmp_path / "meta", tmp_path / "plan.json"
    words = ["metatrain", "digits", "--data", shots / "base.npz", "--ways", 3, "--shots", 2,
             "--queries", 2, "--epochs", 1, "--episodes", 8, "--rule",
             f"p-meta:steps=3,rate=0.05,channels={channels},norms=frozen,share=0.8,prune_to=0.3",
             "--test", shots / "base.npz", "--test-tasks", 5, "--out", meta]  # fmt: skip
    done = modicum(*words)
    assert done.code == 0 and "% of 5 tasks" in done.out, done.err
    few = ["--weights", meta / "weights.pt"]
    done = modicum("plan", "digits", "--classes", 3, *few, "--method", meta / "method.json",
                   "--lr", 1, "--accumulate", 15, "--board", "nano33ble",
                   "--out", plan)  # fmt: skip
    assert done.code == 0, done.err
    made = mo.Plan.load(plan)
    assert made.inner_steps <= 3 and made.optimizer.lr == 1
    assert made.attends == (channels == "both")
    done = modicum("adapt", "digits", "--plan", plan, *few, "--data", shots / "support.npz",
                   "--epochs", 3)  # fmt: skip
    assert done.code == 0 and "steps, loss" in done.out, done.err
    done = modicum("emit", "digits", "--plan", plan, *few, "--out", tmp_path / "c")
    assert done.code == 0, done.err
    assert (tmp_path / "c" / "model_look0.c").exists() == made.attends
    if made.attends:
        done = modicum("plan", "digits", "--classes", 3, "--method", meta / "method.json",
                       "--lr", 1)  # fmt: skip
        assert done.code == 2 and "no channel attention" in done.err


def test_rules_are_compared_by_accuracy_and_by_what_adapting_costs(modicum, shots, tmp_path):
    base = shots / "base.npz"
    words = ["compare", "digits", "--rules", "maml:steps=2,anil:steps=2,protonet,p-meta:steps=2",
             "--data", base, "--test", base, "--ways", 3, "--shots", 2, "--queries", 2,
             "--epochs", 1, "--episodes", 4, "--tasks", 5, "--out", tmp_path]  # fmt: skip
    done = modicum(*words, "--json")
    assert done.code == 0, done.err
    rows = {row["label"].partition(":")[0]: row for row in json.loads(done.out)["rows"]}
    cost = {name: row["cost"] for name, row in rows.items()}
    assert set(rows) == {"maml", "anil", "protonet", "p-meta"}
    assert cost["anil"]["layers"] == [1, 1] and cost["protonet"]["layers"] == []
    for key in ("backward", "measured_backward", "macs"):
        assert cost["anil"][key] < cost["maml"][key]
    assert cost["protonet"]["macs"] * 2 <= cost["anil"]["macs"] < cost["maml"]["macs"]
    assert all(0 <= row["score"] <= 1 and row["labels"] for row in rows.values())
    again = modicum(*words)
    assert again.code == 0 and "% " in again.out and "layers by step" in again.out
    assert (tmp_path / "rules.txt").read_text().strip() in again.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compare what?"),
        (["--rules", "maml", "--methods", "full"], "compare what?"),
        (["--rules", "maml"], "judged on images of other classes"),
        (["--rules", "maml", "--seeds", 2], "--seeds does not go with --rules"),
        (["--methods", "full", "--episodes", 5], "--episodes goes with --rules"),
    ],
)
def test_compare_says_which_flags_belong_together(modicum, shots, tmp_path, words, message):
    done = modicum("compare", "digits", "--data", shots / "base.npz", "--out", tmp_path, *words)
    assert done.code == 2 and message in done.err, done.err


def test_tasks_of_various_ways_do_not_fit_a_head(modicum, shots, tmp_path):
    words = ["metatrain", "digits", "--data", shots / "base.npz", "--ways", "3-5"]
    done = modicum(*words, "--rule", "maml", "--out", tmp_path / "out")
    assert done.code == 2 and "3 to 5 ways do not fit a head" in done.err


def test_of_several_processes_one_says_what_came_of_it(modicum, shots, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    words = ["metatrain", f"{shots / 'net.py'}:make", *SHAPE, "--data", shots / "base.npz"]
    words += ["--epochs", 1, "--episodes", 1, "--warmup", 0, "--shots", 2, "--queries", 2]
    silent = modicum(*words, "--out", tmp_path / "a")
    assert (silent.code, silent.out) == (0, "")
    monkeypatch.setenv("RANK", "0")
    assert "weights.pt: the weights" in modicum(*words, "--out", tmp_path / "b").out


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
