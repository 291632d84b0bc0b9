"""metatrain: it learns, goes on where it was stopped, and does the same in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import modicum as mo
from modicum.errors import InvalidInput, UsageError
from modicum.live import LiveBytes
from modicum.meta import MAMLPP, Episodes, MetaTrain, PMeta, ProtoNet, metatrain, train
from modicum.tasks import Augment, FixedEpisodes, Preprocess, load

SHOWN = Preprocess(size=6, mean=(0.5,), std=(0.5,))
RULE = FixedEpisodes(ways=3, shots=2, queries=3)
SHORT = MetaTrain(
    epochs=3, episodes=6, episode=RULE, rate=0.05, warmup=1, validation=4,
    rule=ProtoNet(norms="batch"), augment=Augment(crop="pad", pad=1, flip=False),
)  # fmt: skip


def images(seed: int = 0, classes: int = 5, each: int = 10):
    """Each class is a noisy picture of its own."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 120, (classes, 6, 6, 1))
    y = np.arange(classes * each) % classes
    noise = rng.integers(0, 136, (len(y), 6, 6, 1))
    return load(((base[y] + noise).astype(np.uint8), y))


def toy(seed: int = 0) -> mo.FewShot:
    """Norms and dropout: what a step draws and follows must not depend on what was before."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    return mo.few_shot(net, 3)


def plain() -> nn.Module:
    """The same with a linear head, whose first layer p-Meta's limit does without."""
    net = toy()
    return nn.Sequential(*net.backbone[:-1], nn.Linear(8, 3))


def wide() -> nn.Module:
    return nn.Sequential(*plain()[:-1], nn.Linear(8, 4))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


DATA, HELD = images(), images(seed=1, classes=4)


@pytest.fixture
def stopped(monkeypatch):
    """A training is stopped when it comes to an epoch."""
    epoch = train._Run.epoch

    def stop_at(n: int) -> None:
        def spy(run, k):
            if k == n:
                raise KeyboardInterrupt
            return epoch(run, k)

        monkeypatch.setattr(train._Run, "epoch", spy)

    yield stop_at
    monkeypatch.undo()


# ---- learning ----------------------------------------------------------------------------------


def test_the_loss_falls_and_other_classes_gain(tmp_path):
    config = SHORT.model_copy(
        update={"epochs": 4, "episodes": 30, "augment": None, "validation": 40}
    )
    net = toy()
    trace = metatrain(net, DATA, SHOWN, config, out=tmp_path, validation=HELD)
    assert trace.losses[-1] < 0.6 * trace.losses[0]
    assert trace.accuracies[-1] > trace.accuracies[0]
    assert trace.validation[trace.best] == max(trace.validation)
    assert trace.validation[trace.best] > 0.6  # a third is a guess
    assert float(net.head.scale) != 10.0 and float(net.head.bias) != 0.0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(trace.losses)
    assert f"epoch {trace.best + 1}, validation accuracy" in str(trace)


def test_the_weights_it_writes_are_those_of_the_net(tmp_path):
    net = toy()
    metatrain(net, DATA, SHOWN, SHORT, out=tmp_path)
    written = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert same(written, net.state_dict())
    other = toy(seed=7)
    other.load_state_dict(written)
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(other.eval().backbone(x), net.eval().backbone(x))


@pytest.mark.parametrize("norms", ["frozen", "batch"])
def test_norms_keep_or_follow_their_statistics(tmp_path, norms):
    net = toy()
    before = {k: v.clone() for k, v in net.backbone[1].state_dict().items()}
    metatrain(
        net, DATA, SHOWN, SHORT.model_copy(update={"rule": ProtoNet(norms=norms)}), out=tmp_path
    )
    after = net.backbone[1].state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(before[name], after[name]) == (norms == "frozen")
    assert not torch.equal(before["weight"], after["weight"])


def test_a_loss_that_is_not_finite_ends_it_without_weights(tmp_path):
    wild = SHORT.model_copy(update={"rate": 1e30, "warmup": 1, "warmup_rate": 1e-3, "epochs": 4})
    with pytest.raises(InvalidInput, match="not finite in update"):
        metatrain(toy(), DATA, SHOWN, wild, out=tmp_path)
    assert not (tmp_path / "weights.pt").exists()


def test_data_that_does_not_do_for_a_task_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(InvalidInput, match="a task of 3 ways"):
        metatrain(toy(), images(classes=2), SHOWN, SHORT, out=tmp_path)
    with pytest.raises(InvalidInput, match="a task of 3 ways"):
        metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path, validation=images(classes=2))
    assert list(tmp_path.iterdir()) == []


# ---- the epoch that is kept ----------------------------------------------------------------------


@pytest.mark.parametrize(("held", "best"), [([0.5, 0.9, 0.6], 1), ([0.8, 0.5, 0.8], 2)])
def test_the_weights_of_the_best_validation_epoch_are_kept(tmp_path, monkeypatch, held, best):
    seen = []

    def validate(run):
        seen.append({k: v.clone() for k, v in run.net.backbone.state_dict().items()})
        return held[len(seen) - 1]

    monkeypatch.setattr(train._Run, "validate", validate)
    net = toy()
    trace = metatrain(net, DATA, SHOWN, SHORT, out=tmp_path, validation=HELD)
    assert trace.best == best and trace.validation == tuple(held)
    assert same(net.backbone.state_dict(), seen[best])
    assert not same(seen[1], seen[2])


def test_without_validation_the_last_epoch_is_kept(tmp_path):
    trace = metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path)
    assert trace.best == 2 and trace.validation == ()


def test_validation_and_test_are_of_other_tasks(tmp_path, monkeypatch):
    seeds = []
    draw = Episodes.draw

    def spy(source, seed, index, train=False):
        seeds.append((seed, train))
        return draw(source, seed, index, train)

    monkeypatch.setattr(Episodes, "draw", spy)
    metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path, validation=HELD, test=HELD, test_tasks=4)
    judged = [seed for seed, train in seeds if not train and seed]
    assert len(judged) == 3 * 4 + 4
    assert len(set(judged[:12])) == len(set(judged[12:])) == 1 and judged[0] != judged[-1]


def test_tasks_of_several_sizes_are_refused_where_they_cannot_be(tmp_path):
    several = SHORT.model_copy(update={"episode": RULE.model_copy(update={"ways": (2, 4)})})
    with pytest.raises(UsageError, match="the model has 3 outputs, and tasks have 4 ways"):
        metatrain(plain(), DATA, SHOWN, several.model_copy(update={"rule": MAMLPP(steps=1)}),
                  out=tmp_path)  # fmt: skip
    at_once = several.model_copy(update={"tasks": 2, "together": 2})
    with pytest.raises(UsageError, match="2 to 4 ways are not computed at once"):
        metatrain(toy(), DATA, SHOWN, at_once, out=tmp_path)
    learned = several.model_copy(update={"rule": PMeta(steps=1)})
    with pytest.raises(UsageError, match="p-Meta does not take tasks of 2 to 4 ways"):
        metatrain(wide(), DATA, SHOWN, learned, out=tmp_path)
    with pytest.raises(UsageError, match="the model has 3 outputs, and tasks have 4 ways"):
        metatrain(plain(), DATA, SHOWN, SHORT.model_copy(update={"rule": MAMLPP(steps=1)}),
                  out=tmp_path, test=Episodes(HELD, SHOWN, several.episode))  # fmt: skip
    metatrain(toy(), DATA, SHOWN, several, out=tmp_path)
    together = SHORT.model_copy(update={"tasks": 2, "together": 2})
    metatrain(toy(), DATA, SHOWN, together, out=tmp_path / "b",
              validation=Episodes(HELD, SHOWN, several.episode))  # fmt: skip


@pytest.mark.parametrize("together", [1, 2])
def test_an_update_of_more_tasks_takes_no_more_memory(tmp_path, together):
    """But for what the largest of them holds: gradients are summed, graphs are let go."""
    peaks = {}
    for tasks in (2, 8):
        config = SHORT.model_copy(
            update={"rule": MAMLPP(steps=2), "episodes": tasks, "tasks": tasks, "warmup": 0,
                    "epochs": 1, "together": together}
        )  # fmt: skip
        with LiveBytes() as live:
            metatrain(plain(), DATA, SHOWN, config, out=tmp_path / str(tasks))
        peaks[tasks] = live.peak
    assert peaks[8] <= 1.02 * peaks[2]


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["frozen", "batch"])
def test_after_an_interruption_the_weights_are_bit_identical(tmp_path, stopped, norms):
    config = SHORT.model_copy(update={"rule": ProtoNet(norms=norms)})
    whole, parts = toy(), toy()
    trace = metatrain(whole, DATA, SHOWN, config, out=tmp_path / "a", validation=HELD)
    stopped(1)
    with pytest.raises(KeyboardInterrupt):
        metatrain(parts, DATA, SHOWN, config, out=tmp_path / "b", validation=HELD)
    stopped(99)
    again = toy()
    torch.manual_seed(1234)  # another process has drawn other numbers
    resumed = metatrain(again, DATA, SHOWN, config, out=tmp_path / "b", validation=HELD)
    assert same(again.state_dict(), whole.state_dict())
    assert resumed.model_copy(update={"seconds": 0}) == trace.model_copy(update={"seconds": 0})


@pytest.mark.parametrize(
    "rule",
    [
        PMeta(steps=2, rate=0.05, share=0.2, prune_from=0.1, prune_to=0.9),
        MAMLPP(steps=2, rate=0.05, multi_step=0.9, first_order=0.2),
    ],
    ids=lambda rule: rule.kind,
)
def test_step_sizes_pruning_and_the_state_of_adam_go_on_too(tmp_path, stopped, rule):
    config = SHORT.model_copy(update={"rule": rule, "optimizer": "adam", "warmup": 0})
    whole, again = plain(), plain()
    trace = metatrain(whole, DATA, SHOWN, config, out=tmp_path / "a", validation=HELD)
    stopped(2)
    with pytest.raises(KeyboardInterrupt):
        metatrain(plain(), DATA, SHOWN, config, out=tmp_path / "b", validation=HELD)
    stopped(99)
    resumed = metatrain(again, DATA, SHOWN, config, out=tmp_path / "b", validation=HELD)
    assert same(again.state_dict(), whole.state_dict())
    assert resumed.losses == trace.losses and resumed.validation == trace.validation
    states = [torch.load(tmp_path / n / "learner.pt", weights_only=True) for n in ("a", "b")]
    assert same(states[0]["learner"], states[1]["learner"])


def test_a_training_that_is_done_is_not_done_again(tmp_path, stopped):
    net, again = toy(), toy()
    trace = metatrain(net, DATA, SHOWN, SHORT, out=tmp_path)
    stopped(0)
    assert metatrain(again, DATA, SHOWN, SHORT, out=tmp_path) == trace
    assert same(again.state_dict(), net.state_dict())


OTHERS = {
    "rate": {"config": SHORT.model_copy(update={"rate": 0.01})},
    "data": {"dataset": images(seed=5)},
    "weights": {"net": toy(seed=3)},
    "preprocess": {"preprocess": Preprocess(size=6, mean=(0.4,), std=(0.5,))},
    "validation": {"validation": HELD},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_the_checkpoint_of_another_training_is_refused_and_left_alone(tmp_path, stopped, change):
    stopped(1)
    given = {"net": toy(), "dataset": DATA, "preprocess": SHOWN, "config": SHORT, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        metatrain(**given)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(InvalidInput, match="is of another training"):
        metatrain(**{**given, "net": toy(), **change})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path, stopped, damage):
    stopped(1)
    with pytest.raises(KeyboardInterrupt):
        metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    if damage == "other":
        torch.save({"state": torch.zeros(3)}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage])
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="cannot read"):
        metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path)
    assert path.read_bytes() == before


# ---- the rate --------------------------------------------------------------------------------


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    config = MetaTrain(epochs=10, episodes=40, tasks=2, rate=1.0, warmup=2, warmup_rate=0.2,
                       final_rate=0.1)  # fmt: skip
    assert config.updates == 200
    rates = [config.rate_at(u) for u in range(config.updates + 1)]
    assert rates[0] == 0.2 and rates[20] == pytest.approx(0.6) and rates[40] == 1.0
    assert np.diff(rates[:41]) == pytest.approx(0.8 / 40)
    assert rates[40 + 80] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[40:]))


def test_without_a_warm_up_the_first_rate_is_the_highest():
    config = MetaTrain(epochs=1, episodes=4, warmup=0, rate=1.0, final_rate=0.0)
    assert [config.rate_at(u) for u in range(4)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    one = MetaTrain(epochs=1, episodes=1, warmup=0, rate=1.0)
    assert one.updates == 1 and one.rate_at(0) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 5, "warmup": 5}, "5.0 epochs of warm-up do not fit in 5"),
        ({"episodes": 5, "tasks": 2}, "5 episodes are not whole updates of 2"),
        ({"rate": -1}, "rate"),
        ({"momentum": 1}, "momentum"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        MetaTrain(**fields)


# ---- TensorBoard ---------------------------------------------------------------------------------


def test_it_does_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path)
    assert (tmp_path / "weights.pt").exists()


def test_with_tensorboard_every_epoch_is_written(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, name, value, epoch):
            written.append((name, epoch))

        def close(self):
            written.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path, validation=HELD)
    for name in ("loss", "accuracy", "validation"):
        assert [e for n, e in written[:-1] if n == name] == [0, 1, 2]
    assert written[-1] == "closed"


# ---- several processes ---------------------------------------------------------------------------

TWO = """
import os, sys
sys.path.insert(0, {here!r})
import torch
from test_metatrain import DATA, HELD, SHORT, SHOWN, plain, toy
from modicum.meta import MAMLPP, PMeta, ProtoNet, metatrain
torch.set_num_threads(1)
for norms, tasks in (("frozen", 1), ("batch", 1), ("frozen", 2)):
    config = SHORT.model_copy(
        update={{"rule": ProtoNet(norms=norms), "epochs": 2, "warmup": 0.5, "tasks": tasks}}
    )
    net, out = toy(), os.path.join({out!r}, norms + (str(tasks) if tasks > 1 else ""))
    trace = metatrain(net, DATA, SHOWN, config, out=out, validation=HELD)
    torch.save((net.state_dict(), trace.model_dump()), out + "/rank" + os.environ["RANK"])
for rule in (PMeta(steps=2, rate=0.05, share=0.2, prune_from=0.1, prune_to=0.3), MAMLPP(steps=2)):
    config = SHORT.model_copy(update={{"rule": rule, "epochs": 2, "warmup": 0.5}})
    net, out = plain(), os.path.join({out!r}, rule.kind)
    trace = metatrain(net, DATA, SHOWN, config, out=out, validation=HELD)
    torch.save((net.state_dict(), trace.model_dump()), out + "/rank" + os.environ["RANK"])
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Folders frozen, batch, frozen2, p-meta and maml++, each with what came of it in rank0 and
    rank1.

    In frozen2 each process takes two tasks an update.
    """
    folder = tmp_path_factory.mktemp("two")
    script = folder / "two.py"
    script.write_text(TWO.format(here=str(Path(__file__).parent), out=str(folder)))
    path = [str(Path(mo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("norms", ["frozen", "batch", "frozen2", "p-meta", "maml++"])
def test_all_processes_end_with_the_same_weights(two_processes, norms):
    first, second = (
        torch.load(two_processes / norms / f"rank{k}", weights_only=True) for k in (0, 1)
    )
    assert same(first[0], second[0])
    assert first[1]["losses"] == second[1]["losses"]
    begun = (plain() if norms in ("p-meta", "maml++") else toy()).state_dict()
    assert not any(torch.equal(first[0][k], w) for k, w in begun.items() if k.endswith("0.weight"))


@pytest.mark.parametrize(("folder", "tasks"), [("frozen", 1), ("frozen2", 2)])
def test_two_processes_do_what_one_does_with_both_their_tasks_in_an_update(
    two_processes, folder, tasks, tmp_path
):
    state, traced = torch.load(two_processes / folder / "rank0", weights_only=True)
    config = SHORT.model_copy(
        update={
            "rule": ProtoNet(),
            "epochs": 2,
            "warmup": 0.5,
            "episodes": 12,
            "tasks": 2 * tasks,
        }
    )
    net = toy()
    trace = metatrain(net, DATA, SHOWN, config, out=tmp_path, validation=HELD)
    for name, value in net.state_dict().items():
        assert torch.allclose(state[name], value, rtol=0, atol=1e-5), name
    assert traced["losses"] == pytest.approx(trace.losses, abs=1e-5)
    assert traced["validation"] == pytest.approx(trace.validation)


def test_a_process_of_several_needs_to_know_where_the_others_are(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR is not"):
        metatrain(toy(), DATA, SHOWN, SHORT, out=tmp_path)
