"""Channel attention in C: the board chooses what an update computes, as PyTorch does."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from functools import cache

import numpy as np
import pytest
import torch
from cases import Built, seq
from emit.folders import Workshop, execute, part, same_on_board
from oracle import randomise, samples
from torch import nn

import modicum as mo
from modicum.adapt import adapt
from modicum.attended import ChannelAttention, attach
from modicum.errors import ModicumError, UsageError
from modicum.heads import few_shot
from modicum.job import PAINT, PARAMETERS, Job
from modicum.meta import PMeta, method_of
from modicum.ops.attention import sides
from modicum.state import image_to_c

STEPS = 3
RATES = {"0.*": (0.3, 0.0), "2.*": (0.0, 0.5, 0.2), "4.*": (0.3,), "7.*": (0.2, 0.4), "9.*": (0.1,)}
MIXED = {"2.*": (0.3, 0.0), "9.*": (0.2, 0.1)}
"""Only the first step has a layer with attention in it."""


def layers(groups: int) -> nn.Module:
    return seq(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=groups), nn.ReLU6()),
        *(nn.Conv2d(6, 10, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(40, 9), nn.ReLU()),
        nn.Linear(9, 4),
    )


def normed() -> nn.Module:
    return seq(
        *(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
    )


def attend(net: nn.Module, channels: str, rho: float) -> nn.Module:
    """A copy with branches as p-Meta has them, far from equal scores."""
    learner = PMeta(steps=1, channels=channels, rho=rho).learner(net)
    torch.manual_seed(len(channels))
    with torch.no_grad():
        for p in learner.attention.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    made = copy.deepcopy(net)
    attach(made, learner.attended, rho)
    return made


def made(net: nn.Module, params: dict, loss: str, accumulate: int, **more) -> Built:
    graph = mo.capture(net, torch.zeros(1, 3, 6, 6))
    rates = {k: {"rates": v} for k, v in params.items()}
    attended = tuple(node.params["weight"] for node in graph.nodes if sides(node))
    method = mo.Explicit(params=rates, attended=attended, **more)
    plan = mo.plan(graph, None, method, mo.SGD(lr=1.0), loss=loss, accumulate=accumulate)
    return Built(None, net, graph, plan)


def cosine() -> nn.Module:
    """Attention below a cosine head, whose prototypes are refreshed."""
    net = attend(randomise(layers(2)), "both", 0.4)
    net = few_shot(net, 4)
    return net


@cache
def build(name: str) -> Built:
    if name == "learned":  # pruned by hand, as training would
        learner = PMeta(steps=STEPS, rate=0.2, rho=0.4, norms="frozen").learner(layers(6))
        randomise(learner.net)
        with torch.no_grad():
            for i, p in enumerate(learner.attention.parameters()):
                p.copy_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        learner.allowed[0, 1:] = False
        learner.allowed[1, 0] = False
        net = layers(6)
        learner.write_to(net)
        graph = mo.capture(net, torch.zeros(1, 3, 6, 6))
        plan = mo.plan(graph, None, method_of(learner), mo.SGD(lr=1.0), accumulate=4)
        return Built(None, net, graph, plan)
    net = randomise(layers(2 if name == "pairs" else 6))
    if name in ("fw", "bw", "both"):
        return made(attend(net, name, 0.4), RATES, "cross_entropy", 3)
    if name == "pairs":
        return made(attend(net, "both", 0.6), RATES, "mse", 2)
    if name == "all channels":
        return made(attend(net, "both", 1.0), RATES, "cross_entropy", 2)
    if name == "one sample":
        return made(attend(net, "both", 0.4), RATES, "cross_entropy", 1)
    if name == "some steps":
        return made(attend(net, "both", 0.3), MIXED, "cross_entropy", 2)
    if name == "batch norms":
        return made(attend(randomise(normed()), "both", 0.5), {"0.*": (0.1,), "3.*": (0.2, 0.0),
                    "7.*": (0.1,)}, "cross_entropy", 3, batch_norms=("1", "4"))  # fmt: skip
    if name == "frozen norms":
        return made(attend(randomise(normed()), "both", 0.5), {"0.*": (0.1, 0.0), "3.*": (0.2,)},
                    "cross_entropy", 3)  # fmt: skip
    assert name == "prototypes"
    return made(cosine(), {"*.4.*": (0.05,), "*.7.*": (0.0, 0.05)}, "cross_entropy", 4)


NAMES = ("learned", "fw", "bw", "both", "pairs", "one sample", "some steps", "batch norms",
         "frozen norms", "prototypes", "all channels")  # fmt: skip


def task(built: Built, more: int = 1) -> tuple[np.ndarray, np.ndarray]:
    n = (built.plan.inner_steps + more) * built.plan.accumulate
    x, y = samples(built.graph, built.plan.loss, n)
    return x.numpy(), y.numpy()


# ---- against PyTorch -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_emitted_c_chooses_and_learns_as_pytorch_does(workshop: Workshop, name: str):
    built = build(name)
    plan, (x, y) = built.plan, task(built)
    assert plan.attends
    by_torch = adapt(built.model, plan, (x, y), epochs=1, record=True)
    folder = workshop.emit(built)
    there = workshop.run(folder, train=(x, y), order=by_torch.order, test=(x, y), record=True)
    largest, where = part(by_torch, there)
    assert largest < 1e-4, where
    assert there.figures["arena_high_water"] <= plan.cost.arena
    for a, b in zip(there.tensors.values(), by_torch.tensors.values(), strict=True):
        first = (a[plan.accumulate - 1 :: plan.accumulate] != a[:1]).any(0)
        assert np.array_equal(first, (b[plan.accumulate - 1 :: plan.accumulate] != b[:1]).any(0))


def test_what_c_learns_in_a_task_is_what_the_rule_learns(workshop: Workshop):
    learner = PMeta(steps=STEPS, rate=0.2, rho=0.4, norms="frozen").learner(randomise(layers(6)))
    learner.allowed[1, 1:] = False
    learner.eval()
    net = layers(6)
    learner.write_to(net)
    graph = mo.capture(net, torch.zeros(1, 3, 6, 6))
    plan = mo.plan(graph, None, method_of(learner), mo.SGD(lr=1.0), accumulate=4)
    built = Built(None, net, graph, plan)
    x, y = samples(graph, plan.loss, 4)
    with torch.no_grad():
        want = learner.adapt(x, y, STEPS)
    data = (x.numpy(), y.numpy())
    job = {"train": data, "order": list(range(4)) * STEPS, "record": True}
    there = workshop.run(workshop.emit(built), **job)
    for k in range(STEPS):
        for name, steps in there.tensors.items():
            value, right = steps[4 * k + 3], want[k][name].numpy()
            assert np.abs(value - right).max() <= 1e-4 * np.abs(right).max(), (name, k)


@pytest.mark.parametrize("name", ["learned", "pairs", "one sample", "some steps", "prototypes"])
def test_the_folder_checks_itself_against_masked_dense_gradients(workshop: Workshop, name: str):
    built = build(name)
    folder = workshop.emit(built)
    for variant, target in (("host-fast", "check"), ("sanitize-fast", "sanitize")):
        done = workshop.make(folder, variant, target)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        steps = int(re.match(r"ok: (\d+) steps, ", done.stdout)[1])
        assert steps % built.plan.accumulate == 0
    shutil.rmtree(folder)


def test_make_check_finds_another_choice(workshop: Workshop):
    folder = workshop.emit(build("learned"))
    source = folder / "model_look0.c"
    text = source.read_text()
    assert "0.4f, 4);" in text
    source.write_text(text.replace("0.4f, 4);", "0.99f, 4);"))
    done = workshop.make(folder, "host-fast", "check")
    assert done.returncode != 0
    assert re.search("check: step 3, .* differs", done.stderr), done.stderr


def test_the_arena_is_full_where_all_scores_are_equal(workshop: Workshop):
    """Then as many channels are kept as the clip allows: the worst case that the plan is for."""
    net = attend(randomise(layers(6)), "both", 0.45)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "attention" in name:
                p.zero_()
    built = made(net, {"*": (0.1,)}, "cross_entropy", 3)
    assert [p.steps for p in built.plan.patterns] == [(0,)]
    x, y = task(built)
    there = workshop.run(workshop.emit(built), train=(x, y), test=(x[:1], y[:1]))
    assert there.figures["arena_high_water"] == built.plan.cost.arena


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["learned", "prototypes"])
def test_a_board_chooses_bit_by_bit_as_the_host(workshop: Workshop, name: str):
    built = build(name)
    folder = workshop.emit(built)
    x, y = task(built)
    figures, cost = same_on_board(workshop, folder, x, y).figures, built.plan.cost
    assert figures["arena_high_water"] <= cost.arena and figures["ram"] <= cost.ram
    assert 0 <= figures["weights"] - cost.flash_weights < 16
    assert figures["text"] <= cost.flash_code
    assert figures["instructions_attend"] > 0


# ---- the order of the passes -----------------------------------------------------------------


def test_samples_are_attended_to_and_then_learned(workshop: Workshop):
    built = build("learned")
    n = built.plan.accumulate
    x, y = task(built, more=2)
    x = image_to_c(x)
    net = workshop.native(workshop.emit(built))
    with pytest.raises(ModicumError, match="attends to all its samples"):
        net.train(x[0], y[0])
    for i in range(n):
        net.attend(x[i], y[i])
    with pytest.raises(ModicumError, match="attends to all its samples"):
        net.attend(x[0], y[0])
    before = net.trained()
    for i in reversed(range(n)):  # in any order
        assert all(np.array_equal(a, b) for a, b in zip(net.trained(), before, strict=True))
        net.train(x[i], y[i])
        if i:
            with pytest.raises(ModicumError, match="attends to all its samples"):
                net.attend(x[0], y[0])
    assert not all(np.array_equal(a, b) for a, b in zip(net.trained(), before, strict=True))
    with pytest.raises(ModicumError, match="out of range"):
        net.attend(x[0], 4)
    net._memory.raw = bytes(len(net._memory))
    with pytest.raises(ModicumError, match="not initialised"):
        net.attend(x[0], y[0])


def test_a_step_without_attention_needs_no_first_pass(workshop: Workshop):
    built = build("some steps")
    assert [look is not None for look in built.plan.looks] == [True, False]
    x, y = task(built)
    nets = [workshop.native(folder) for folder in [workshop.emit(built)] * 2]
    for net, every in zip(nets, (True, False), strict=True):
        for step in range(3):
            for i in (0, 1):
                if every or step == 0:  # where it is not needed, it does nothing
                    net.attend(image_to_c(x)[i], y[i])
            for i in (0, 1):
                net.train(image_to_c(x)[i], y[i])
    assert nets[0].export_state() == nets[1].export_state()


def test_a_sample_whose_loss_is_not_finite_makes_all_pass_again(workshop: Workshop):
    built = build("learned")
    n = built.plan.accumulate
    x, y = task(built)
    x = image_to_c(x)
    nets = [workshop.native(folder) for folder in [workshop.emit(built)] * 2]
    nets[0].attend(x[0], y[0])
    with pytest.raises(ModicumError, match="loss is not finite"):
        nets[0].attend(np.full_like(x[0], 3e38), y[0])
    for net in nets:
        for i in range(n):
            net.attend(x[i], y[i])
        for i in range(n):
            net.train(x[i], y[i])
    assert nets[0].export_state() == nets[1].export_state()


def test_a_new_task_forgets_what_was_attended_to(workshop: Workshop):
    built = build("one sample")
    x, y = task(built)
    x = image_to_c(x)
    net = workshop.native(workshop.emit(built))
    net.attend(x[0], y[0])
    net.clear_steps()
    with pytest.raises(ModicumError, match="attends to all its samples"):
        net.train(x[0], y[0])
    net.attend(x[1], y[1])
    net.train(x[1], y[1])


def test_an_update_goes_on_bit_by_bit_from_a_blob_wherever_it_was_cut(workshop: Workshop, tmp_path):
    built = build("both")
    n, (x, y) = built.plan.accumulate, task(built)
    folder = workshop.emit(built)
    done = workshop.make(folder, "sanitize-fast", "build/sanitize-fast/main")
    assert done.returncode == 0, done.stderr
    images = image_to_c(x)
    calls = [
        (do, i)
        for start in range(0, len(x), n)
        for do in ("attend", "train")
        for i in range(start, start + n)
    ]

    def run(parts: list, blob: bytes = b"") -> list:
        job = Job(images[0].size, 0, PAINT | PARAMETERS)
        if blob:
            job.import_state(blob)
        for do, i in parts:
            getattr(job, do)(images[i], int(y[i]))
        job.export_state()
        result, said = execute(folder / "build/sanitize-fast/main", job, tmp_path)
        assert result is not None and "Sanitizer" not in said, said
        assert all(r.status == 0 for r in result.records)
        return result.records

    whole = run(calls)[-1].blob
    for cut in range(1, len(calls), 2):
        blob = run(calls[:cut])[-1].blob
        assert run(calls[cut:], blob)[-1].blob == whole


# ---- the interface ---------------------------------------------------------------------------


def test_attending_is_part_of_the_interface_of_such_a_net_only(workshop: Workshop):
    built = build("one sample")
    folder = workshop.emit(built)
    workshop.native(folder)
    names = subprocess.run(
        ["nm", "-D", "--defined-only", str(folder / "build/host-parity/libmodel.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "model_attend" in {line.split()[-1] for line in names.splitlines()}
    assert "model_attend(&net, x, label);" in (folder / "README.md").read_text()
    plain = mo.plan(built.graph, None, mo.Last(n=1))
    other = mo.emit(built.model, plain, workshop.root / "plain")
    assert "attend" not in (other / "model.h").read_text()
    with pytest.raises(UsageError, match="no channel attention"):
        workshop.native(other).attend(np.zeros(108, np.float32), 0)


def test_candidates_and_leftover_samples_are_refused(workshop: Workshop):
    net = randomise(layers(6))
    attach(net, {"4": ChannelAttention(6, 10)}, 0.5)
    built = made(net, {"4.*": (0.1,)}, "cross_entropy", 2)
    with pytest.raises(UsageError, match=r"plan 0 .* has channel attention"):
        mo.emit(net, plans=[built.plan], out=workshop.root / "set")
    x, y = task(built)
    folder = workshop.emit(built)
    with pytest.raises(UsageError, match="3 samples are not whole updates of 2"):
        workshop.run(folder, train=(x, y), order=[0, 1, 2])
