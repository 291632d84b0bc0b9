"""Candidate sets: several plans in one net, of which the board selects one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, build, captured
from emit.folders import Workshop, execute

import modicum as mo
from modicum.emit import Candidates
from modicum.job import PAINT, PARAMETERS, Job
from modicum.models import DigitsNet
from modicum.state import image_to_c

MODEL, GRAPH = captured("few shot")
SOME = mo.Explicit(params={"*.5.weight": {"out": (0, 4)}})
PLANS = [
    mo.plan(GRAPH, "nano33ble", SOME, mo.SGD(lr=0.1)),
    mo.plan(GRAPH, "nano33ble", mo.Full(), mo.Adam(lr=0.01), accumulate=3),
    mo.plan(GRAPH, "nano33ble", mo.Last(n=2), mo.SGD(lr=0.05, momentum=0.9), accumulate=2),
    mo.plan(GRAPH, "nano33ble", mo.Full(norms="batch"), mo.SGD(lr=0.05)),
]  # fmt: skip
WORST = 1


def samples(n: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, *GRAPH.shape("input")[1:])).astype(np.float32)
    return x, np.arange(n) % 4


def job_of(test: bool = True) -> dict[str, object]:
    x, y = samples()
    more = {"test": (x, y)} if test else {}
    return {"train": (x, y), "order": [3, 0, 6, 1, 5, 2, 4, 0], "support": (x[:4], y[:4]),
            "refresh": 3, "record": True, **more}  # fmt: skip


@pytest.fixture(scope="module")
def folder(workshop: Workshop) -> Path:
    return mo.emit(MODEL, plans=PLANS, out=workshop.root / "set", name="many")


@pytest.fixture
def net(workshop: Workshop, folder: Path) -> mo.Native:
    return workshop.native(folder)


# ---- each member is what its plan is alone ---------------------------------------------------


@pytest.mark.parametrize("member", range(len(PLANS)))
def test_a_member_trains_bit_by_bit_as_its_plan_alone(workshop, folder, member):
    alone = workshop.run(
        mo.emit(MODEL, PLANS[member], workshop.root / f"alone{member}"), **job_of()
    )
    there = workshop.run(folder, select=member, **job_of())
    assert there.plan_hash == alone.plan_hash == PLANS[member].hash
    assert mo.compare(alone, there).bitwise
    for name, tensor in alone.tensors.items():
        assert there.tensors[name].tobytes() == tensor.tobytes(), name
    assert there.logits_after.tobytes() == alone.logits_after.tobytes()
    assert not np.array_equal(there.logits_before, there.logits_after)
    assert there.figures["arena_high_water"] == PLANS[member].cost.arena


@pytest.mark.qemu
def test_a_board_runs_a_member_as_the_host_in_the_ram_of_its_plan(workshop, folder):
    host, there = (workshop.run(folder, on, select=2, **job_of()) for on in ("host", "m4f"))
    assert mo.compare(host, there).bitwise
    assert there.logits_after.tobytes() == host.logits_after.tobytes()
    figures = there.figures
    assert figures["arena_high_water"] == PLANS[2].cost.arena
    assert figures["ram"] <= PLANS[2].cost.ram
    both = Candidates(tuple(PLANS))
    assert figures["weights"] == both.flash_weights
    assert figures["text"] <= both.flash_code
    assert figures["instructions_prototype"] < figures["instructions_train"]


def test_without_a_choice_the_first_member_is_run(workshop, folder):
    assert workshop.run(folder).plan_hash == PLANS[0].hash


# ---- select ----------------------------------------------------------------------------------


def test_selecting_starts_the_member_anew(net):
    x, y = samples()
    image = image_to_c(x)[0]
    assert (net.members, net.selected) == (len(PLANS), 0)
    states, first = [], net.predict(image)
    for member in (*range(len(PLANS)), *range(len(PLANS))):
        net.select(member)
        assert net.selected == member
        assert np.abs(net.predict(image) - first).max() <= 1e-5 * np.abs(first).max()
        states.append(net.export_state())
        for i in range(3):
            net.train(image_to_c(x)[i], y[i])
        assert net.export_state() != states[-1]
    assert states[: len(PLANS)] == states[len(PLANS) :]


@pytest.mark.parametrize("index", [-1, len(PLANS), 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_is_refused_and_changes_nothing(net, index):
    x, y = samples()
    net.select(2)
    net.train(image_to_c(x)[0], y[0])
    before = bytes(net._memory.raw)
    with pytest.raises(mo.InvalidInput, match="no such member"):
        net.select(index)
    assert net.selected == 2 and bytes(net._memory.raw) == before


def test_a_net_that_was_not_initialised_has_no_member(net):
    net._memory.raw = bytes(len(net._memory))
    assert net.selected == -1
    assert not net._call["input"](net._net)
    with pytest.raises(mo.ModicumError, match="not initialised"):
        net.predict(np.zeros(net.inputs))
    assert net.export_state() == b"" and net.trained() == []


def test_a_damaged_selection_is_refused(net):
    fields = np.frombuffer(net._memory, np.int32)
    at = (net._net.value - fields.ctypes.data) // 4
    for wrong in (len(PLANS), -1):
        fields[at + 6] = wrong  # magic, lr, four of progress, selected
        with pytest.raises(mo.ModicumError, match="not initialised"):
            net.predict(np.zeros(net.inputs))


def test_a_blob_of_another_member_is_refused_and_changes_nothing(net):
    x, y = samples()
    blobs = []
    for member in range(len(PLANS)):
        net.select(member)
        net.train(image_to_c(x)[0], y[0])
        blobs.append(net.export_state())
        assert blobs[-1][8:24].hex() == PLANS[member].hash[:32]
    for member in range(len(PLANS)):
        net.select(member)
        before = net.export_state()
        for other, blob in enumerate(blobs):
            if other != member:
                with pytest.raises(mo.InvalidInput, match=r"another plan|wrong length"):
                    net.import_state(blob)
                assert net.export_state() == before
        net.import_state(blobs[member])
        assert net.export_state() == blobs[member]


def test_a_blob_of_a_member_is_that_of_the_plan_alone(workshop, folder, net):
    x, y = samples()
    alone = workshop.native(mo.emit(MODEL, PLANS[1], workshop.root / "blob"))
    net.select(1)
    for one in (net, alone):
        one.train(image_to_c(x)[0], y[0])
    assert net.export_state() == alone.export_state()


def test_a_blob_of_the_same_length_is_told_by_its_plan(workshop):
    rates = [mo.plan(GRAPH, None, mo.Last(n=1), mo.SGD(lr=lr)) for lr in (0.1, 0.2)]
    net = workshop.native(mo.emit(MODEL, plans=rates, out=workshop.root / "rates"))
    blob = net.export_state()
    net.select(1)
    with pytest.raises(mo.InvalidInput, match="belongs to another plan"):
        net.import_state(blob)


def test_a_job_may_switch_between_members(workshop, folder):
    x, y = samples()
    images = image_to_c(x)
    workshop.run(folder)
    job = Job(images[0].size, 0, PAINT | PARAMETERS)
    for member in (1, 0, len(PLANS), 3):
        job.select(member)
        job.train(images[0], int(y[0]))
    program = folder / "build/host-parity/main"
    result, said = execute(program, job, workshop.root)
    assert result is not None, said
    assert [r.status for r in result.records] == [0, 0, 0, 0, -11, 0, 0, 0]
    sizes = [sum(t.size for t in p.program.learned) for p in PLANS]
    assert [r.values.size for r in result.records[1::2]] == [sizes[i] for i in (1, 0, 0, 3)]


# ---- the folder ------------------------------------------------------------------------------


def test_the_folder_checks_every_member_and_is_clean_under_sanitizers(workshop, folder):
    for variant, target in (("host-fast", "check"), ("sanitize-fast", "sanitize")):
        done = workshop.make(folder, variant, target)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" and done.stdout.startswith("ok: 12 steps, ")


def test_the_check_names_the_member_that_differs(workshop):
    made = mo.emit(MODEL, plans=PLANS, out=workshop.root / "spoiled", name="many")
    source = made / "many_member1.c"
    betas = "0.9f, 0.999f"
    assert betas in source.read_text()
    source.write_text(source.read_text().replace(betas, "0.5f, 0.999f"))
    done = workshop.make(made, "host-fast", "check")
    assert done.returncode != 0
    assert re.search(r"check: member 1, step \d, ", done.stderr), done.stderr


def test_what_members_have_in_common_is_in_flash_once(folder):
    text = (folder / "many_weights.c").read_text()
    sizes = [int(n) for n in re.findall(r"^const float \w+\[(\d+)\]", text, re.M)]
    channels = [int(n) for n in re.findall(r"^const uint16_t \w+\[(\d+)\]", text, re.M)]
    geometry = len(re.findall(r"^const mo_conv_t ", text, re.M))
    both = Candidates(tuple(PLANS))
    assert both.flash_weights == 4 * sum(sizes) + 2 * sum(channels) + 60 * geometry
    assert both.flash_weights < sum(p.cost.flash_weights for p in PLANS) / 2
    symbols = re.findall(r"^const \w+ (\w+)", text, re.M)
    assert all(s.startswith("many_") for s in symbols) and len(set(symbols)) == len(symbols)
    arrays = re.findall(r"^const float \w+(\[\d+\] = \{[^}]*\})", text, re.M)
    whole = [a for a in arrays if len(a) > 300]
    assert len(set(whole)) == len(whole)


def test_a_members_schedule_is_a_file_of_its_own(folder):
    for i in range(len(PLANS)):
        text = (folder / f"many_member{i}.c").read_text()
        assert "static void forward(many_t *m" in text and "static void backward(" in text
    assert "mo_conv2d" not in (folder / "many.c").read_text()


def test_the_arena_is_that_of_the_worst_member(net, folder):
    both = Candidates(tuple(PLANS))
    assert both.worst == WORST and both.ram == PLANS[WORST].cost.ram
    arena = max(p.cost.arena for p in PLANS)
    assert f"#define MANY_ARENA {arena} " in (folder / "many.h").read_text()
    assert net._call["size"]() == 32 + -(-arena // 16) * 16


def test_the_api_is_all_that_is_seen_from_outside(workshop, folder, net):
    library = folder / "build" / "host-parity" / "libmany.so"
    text = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1] for line in text.splitlines()} == {
        f"many_{name}"
        for name in ("init", "input", "predict", "train", "export_state", "import_state", "trained",
                     "size", "error", "prototypes_clear", "prototypes_add", "select", "selected")
    }  # fmt: skip


def test_gcc_and_clang_compile_the_set_without_a_warning(workshop, folder, tmp_path):
    sources = [str(p) for p in folder.glob("many*.c")]
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wvla",
             "-Wundef", "-Wcast-qual", "-Wstrict-prototypes", "-Werror", f"-I{folder}",
             f"-I{folder / 'kernels'}", "-fsyntax-only"]  # fmt: skip
    for compiler in filter(shutil.which, ("gcc", "clang")):
        subprocess.run([compiler, *flags, *sources], check=True, cwd=tmp_path)


def test_a_set_for_targets_trains_too(workshop):
    row = build(next(c for c in CASES if c.id == "regression-Full-Adam-x2"))
    plans = [row.plan, mo.plan(row.graph, None, mo.Last(), mo.SGD(lr=0.1), loss="mse")]
    folder = mo.emit(row.model, plans=plans, out=workshop.root / "targets")
    x, y = (t.numpy() for t in row.samples(5))
    for i, plan in enumerate(plans):
        alone = mo.emit(row.model, plan, workshop.root / f"target{i}")
        a, b = (
            workshop.run(made, train=(x, y), record=True, **more)
            for made, more in ((alone, {}), (folder, {"select": i}))
        )
        assert mo.compare(a, b).bitwise
    net = workshop.native(folder)
    assert net.members == 2 and net.targets == y.shape[1]


# ---- what is refused -------------------------------------------------------------------------


def test_plans_that_do_not_belong_together_are_named(tmp_path):
    _, other = captured("mobile")
    odd = {
        "plan 2 (full) is of another graph": mo.plan(other),
        "plan 2 (full) is of another loss": mo.plan(GRAPH, "nano33ble", loss="mse"),
        "plan 2 (full) is of another board": mo.plan(GRAPH, "stm32h743"),
    }
    for message, plan in odd.items():
        with pytest.raises(mo.ModicumError, match=re.escape(message)) as caught:
            mo.emit(MODEL, plans=[*PLANS[:2], plan], out=tmp_path / "out")
        assert caught.value.exit_code == 2
    with pytest.raises(mo.ModicumError, match="at least one plan"):
        mo.emit(MODEL, plans=[], out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_flash_does_not_hold_is_refused(tmp_path):
    flash = max(p.cost.flash for p in PLANS)
    tight = [p.model_copy(update={"flash": flash}) for p in PLANS]
    with pytest.raises(mo.DoesNotFit, match=r"4 plans need .* of flash together, nano33ble has"):
        mo.emit(MODEL, plans=tight, out=tmp_path / "out")
    Candidates((tight[WORST],))


def test_emit_takes_a_plan_or_plans(tmp_path):
    for given in ({"plan": PLANS[0], "plans": PLANS}, {}):
        with pytest.raises(mo.ModicumError, match="takes a plan or plans"):
            mo.emit(MODEL, out=tmp_path / "out", **given)


def test_a_member_that_the_folder_does_not_hold_is_refused(workshop, folder):
    for index in (-1, len(PLANS)):
        with pytest.raises(mo.ModicumError, match=f"holds no plan {index}") as caught:
            workshop.run(folder, select=index)
        assert "0 to 3" in str(caught.value)
    alone = mo.emit(MODEL, PLANS[0], workshop.root / "one")
    with pytest.raises(mo.ModicumError, match="holds one plan"):
        workshop.run(alone, select=0)
    with pytest.raises(mo.ModicumError, match="the net has no plans to select from"):
        workshop.native(alone).select(0)


def test_the_summary_tells_the_worst_ram_and_the_flash_of_all():
    both = Candidates(tuple(PLANS))
    text = str(both)
    assert text.startswith("4 plans") and "of plan 1, which needs most" in text
    assert both.flash == both.flash_weights + both.flash_code
    assert both.flash < sum(p.cost.flash for p in PLANS)
    one = Candidates((PLANS[0],))
    assert (one.flash, one.ram) == (PLANS[0].cost.flash, PLANS[0].cost.ram)


def test_the_command_line_emits_a_set_and_runs_a_member(tmp_path, monkeypatch, capsys):
    from modicum import cli

    def modicum(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["modicum", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    graph = mo.capture(DigitsNet(10).eval(), torch.zeros(1, 1, 8, 8))
    plans = [mo.plan(graph, None, m, mo.SGD(lr=0.1)) for m in (mo.Last(n=1), mo.Bias())]
    for i, plan in enumerate(plans):
        plan.save(tmp_path / f"{i}.json")
    words = ["emit", "digits", "--plan", tmp_path / "0.json", "--plan", tmp_path / "1.json"]
    code, out, err = modicum(*words, "--out", tmp_path / "set", "--json")
    assert code == 0, err
    data = json.loads(out)["candidates"]
    assert [p["hash"] for p in data["plans"]] == [p.hash for p in plans]
    assert (data["ram"], data["worst"]) == (max(p.cost.ram for p in plans), 1)
    code, out, err = modicum(*words, "--out", tmp_path / "again")
    assert code == 0 and "2 plans" in out and "of all" in out
    monkeypatch.setenv("OPT", "-O0")
    code, out, err = modicum("run", tmp_path / "set", "--select", 1, "--out", tmp_path / "t.json")
    assert code == 0, err
    assert mo.Trace.load(tmp_path / "t.json").plan_hash == plans[1].hash
    code, out, err = modicum("run", tmp_path / "set", "--select", 2)
    assert code == 2 and "--select 0 to 1" in err
    mo.plan(graph, None, loss="mse").save(tmp_path / "1.json")
    code, out, err = modicum(*words, "--out", tmp_path / "odd")
    assert code == 2 and "plan 1 (full) is of another loss" in err
