"""Step sizes by inner step in C: patterns over one arena, the count of updates, and its blob."""

from __future__ import annotations

import copy
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import STEPS, Built, Case, build, captured
from emit.folders import Workshop, execute, part, same_on_board

import modicum as mo
from modicum.adapt import adapt, torch_optimizer, update
from modicum.errors import UsageError
from modicum.job import PAINT, PARAMETERS, Job, Result
from modicum.state import from_c, image_to_c

MOST = 0x7FFFFFFF
STEPS_AT, COLLECTED_AT = 28, 32
rows = pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
SLICES = next(c for c in STEPS if c.note == "slices by step")
PROTOTYPES = next(c for c in STEPS if c.note == "prototypes by step")
RATES = next(c for c in STEPS if c.note == "rates by step")


def tasks(built: Built, more: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Samples for every inner step, and for a few updates after them."""
    n = (built.plan.inner_steps + more) * built.plan.accumulate
    x, y = built.samples(n)
    return x.numpy(), y.numpy()


# ---- against PyTorch -------------------------------------------------------------------------


@rows
def test_the_emitted_c_goes_through_the_patterns_as_pytorch_does_in_the_planned_arena(
    workshop: Workshop, case: Case
):
    built = build(case)
    x, y = tasks(built)
    by_torch = adapt(built.model, built.plan, (x, y), epochs=1, record=True, test=(x, y))
    folder = workshop.emit(built)
    there = workshop.run(folder, train=(x, y), order=by_torch.order, test=(x, y), record=True)
    largest, where = part(by_torch, there)
    assert largest < 1e-4, where
    for a, b in (
        (by_torch.logits_before, there.logits_before),
        (by_torch.logits_after, there.logits_after),
    ):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()
    assert there.figures["arena_high_water"] == built.plan.cost.arena
    every = built.plan.accumulate
    for step in range(built.plan.inner_steps):
        moved = built.plan.selection.updated_in(step)
        for u in built.plan.selection.updates:
            values = there.tensors[u.param][every - 1 :: every]
            if step and u.param not in moved:
                assert np.array_equal(values[step], values[step - 1]), (u.param, step)


@pytest.mark.parametrize("case", [SLICES, PROTOTYPES, RATES], ids=lambda case: case.id)
def test_the_folder_checks_itself_until_every_pattern_has_run(workshop: Workshop, case: Case):
    built = build(case)
    folder = workshop.emit(built)
    for variant, target in (("host-fast", "check"), ("sanitize-fast", "sanitize")):
        done = workshop.make(folder, variant, target)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        steps = int(re.match(r"ok: (\d+) steps, ", done.stdout)[1])
        last = max(pattern.steps[0] for pattern in built.plan.patterns)
        assert steps >= (last + 1) * built.plan.accumulate
    shutil.rmtree(folder)


def test_make_check_finds_a_rate_that_is_not_the_plans(workshop: Workshop):
    folder = workshop.emit(build(RATES))
    source = folder / "model.c"
    text = source.read_text()
    assert "= {1.0f, -0.25f, 2.0f};" in text
    source.write_text(text.replace("= {1.0f, -0.25f, 2.0f};", "= {1.0f, -0.35f, 2.0f};"))
    done = workshop.make(folder, "host-fast", "check")
    assert done.returncode != 0
    assert "check: step 1, 0." in done.stderr


def test_adam_corrects_by_the_updates_of_each_parameter_long_after_the_last_inner_step(workshop):
    model, graph = captured("regression")
    rates = {"0.*": {"rates": (1.0, 0.0, 0.0, 1.0)}, "3.*": {"rates": (0.0, 1.0, 0.0, 1.0)},
             "1.bias": None}  # fmt: skip
    rule = mo.Adam(lr=1e-3, betas=(0.9, 0.99))
    plan = mo.plan(graph, None, mo.Explicit(params=rates), rule, loss="mse")
    built = Built(STEPS[0], model, graph, plan)
    x, y = (t.numpy() for t in built.samples(60))
    net = workshop.native(workshop.emit(built))
    trace = adapt(model, plan, (x, y), epochs=1, record=True)
    for i in trace.order:
        net.train(x[i], y[i])
    for t, flat in zip(plan.program.learned, net.trained(), strict=True):
        want = trace.tensors[t.param][-1]
        got = from_c(flat, t.shape, t.layout)
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), t.param


@pytest.mark.qemu
def test_a_board_goes_through_the_patterns_bit_by_bit_as_the_host(workshop: Workshop):
    built = build(SLICES)
    folder = workshop.emit(built)
    x, y = tasks(built)
    figures, cost = same_on_board(workshop, folder, x, y).figures, built.plan.cost
    assert figures["arena_high_water"] == cost.arena and figures["ram"] <= cost.ram
    assert 0 <= figures["weights"] - cost.flash_weights < 16  # lists of channels are padded
    assert figures["text"] <= cost.flash_code


# ---- the count -------------------------------------------------------------------------------


class Runner:
    """A net's job runner, built with the sanitizers."""

    def __init__(self, workshop: Workshop, case: Case, scratch: Path) -> None:
        self.built, self.scratch = build(case), scratch
        folder = workshop.emit(self.built)
        done = workshop.make(folder, "sanitize-fast", "build/sanitize-fast/main")
        assert done.returncode == 0, done.stderr
        self.program = folder / "build/sanitize-fast/main"
        self.x, self.y = tasks(self.built, 4)

    def job(self) -> Job:
        graph = self.built.graph
        return Job(graph.values[graph.input].size, 0, PAINT | PARAMETERS)

    def train(self, job: Job, samples: range) -> None:
        images = image_to_c(self.x)
        for i in samples:
            job.train(images[i % len(images)], int(self.y[i % len(images)]))

    def run(self, job: Job) -> Result:
        result, said = execute(self.program, job, self.scratch)
        assert result is not None, said
        assert "Sanitizer" not in said and "runtime error" not in said, said
        return result


@pytest.fixture(scope="module", params=[SLICES, PROTOTYPES, RATES], ids=lambda case: case.id)
def runner(request, workshop: Workshop, tmp_path_factory) -> Runner:
    return Runner(workshop, request.param, tmp_path_factory.mktemp("jobs"))


def word(blob: bytes, at: int) -> int:
    return struct.unpack_from("<I", blob, at)[0]


def signed(blob: bytes) -> bytes:
    return blob[:-4] + struct.pack("<I", zlib.crc32(blob[:-4]))


def with_steps(blob: bytes, steps: int) -> bytes:
    return signed(blob[:STEPS_AT] + struct.pack("<I", steps) + blob[COLLECTED_AT:])


def test_an_adaptation_goes_on_bit_by_bit_from_a_blob_wherever_it_was_cut(runner: Runner):
    total = len(runner.x)
    through = runner.job()
    runner.train(through, range(total))
    through.export_state()
    whole = runner.run(through).records
    for cut in range(1, total):
        before, after = runner.job(), runner.job()
        runner.train(before, range(cut))
        before.export_state()
        blob = runner.run(before).records[-1].blob
        every = runner.built.plan.accumulate
        assert (word(blob, STEPS_AT), word(blob, COLLECTED_AT)) == divmod(cut, every)
        runner.train(after, range(2))  # of another inner step
        after.import_state(blob)
        runner.train(after, range(cut, total))
        after.export_state()
        rest = runner.run(after).records[2:]
        assert rest[0].status == 0
        for a, b in zip(whole[cut:total], rest[1:-1], strict=True):
            assert a.loss == b.loss and a.values.tobytes() == b.values.tobytes()
        assert whole[-1].blob == rest[-1].blob


def test_a_damaged_count_is_refused_and_changes_nothing(runner: Runner):
    first = runner.job()
    runner.train(first, range(runner.built.plan.accumulate))
    first.export_state()
    good = runner.run(first).records[-1].blob
    bad = {
        good[:STEPS_AT] + b"\x02" + good[STEPS_AT + 1 :]: -8,
        good[: STEPS_AT + 3] + b"\x80" + good[COLLECTED_AT:]: -8,
        with_steps(good, MOST + 1): -9,
        with_steps(good, 0xFFFFFFFF): -9,
    }
    job = runner.job()
    runner.train(job, range(1))
    job.export_state()
    for blob in bad:
        job.import_state(blob)
        job.export_state()
    records = runner.run(job).records[1:]
    assert [r.status for r in records[1::2]] == list(bad.values())
    assert len({r.blob for r in records[::2]}) == 1


def test_the_count_stays_where_it_ends_and_training_goes_on(runner: Runner):
    plan = runner.built.plan
    first = runner.job()
    runner.train(first, range(plan.inner_steps * plan.accumulate))
    first.export_state()
    good = runner.run(first).records[-1].blob
    job = runner.job()
    job.import_state(with_steps(good, MOST - 1))
    runner.train(job, range(3 * plan.accumulate))
    job.export_state()
    records = runner.run(job).records
    assert all(r.status == 0 for r in records)
    assert word(records[-1].blob, STEPS_AT) == MOST
    assert np.isfinite(records[-2].values).all()
    assert not np.array_equal(records[1].values, records[-2].values)


def test_cleared_steps_begin_a_task_with_the_weights_that_there_are(runner: Runner):
    """As adapting again in PyTorch: the first inner step, and nothing the optimiser remembers."""
    built, every = runner.built, runner.built.plan.accumulate
    if every > 1:  # samples that wait for an update are forgotten
        learned, forgotten = 3 * every, 1
    else:
        learned, forgotten = 3, 0
    n = (built.plan.inner_steps + 1) * every
    job = runner.job()
    runner.train(job, range(learned + forgotten))
    job.clear_steps()
    job.export_state()
    runner.train(job, range(n))
    records = runner.run(job).records
    assert all(r.status == 0 for r in records)
    blob = records[learned + forgotten + 1].blob
    assert blob[STEPS_AT:44] == bytes(16)
    plan, offsets = built.plan, built.plan.offsets
    payload = np.frombuffer(blob[44:-4], np.float32)
    for b in plan.program.buffers.values():
        if b.kind in ("optimizer", "accumulator"):
            at = offsets[b.name] // 4
            assert not payload[at : at + b.bytes // 4].any(), b.name

    model = copy.deepcopy(built.model)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    at = 0
    for t in plan.program.learned:
        value = from_c(records[learned - 1].values[at : at + t.size], t.shape, t.layout)
        at += t.size
        with torch.no_grad():
            whole = state[t.param].numpy()
            rows_ = list(range(len(whole))) if t.slice.out is None else list(t.slice.out)
            if t.slice.inp is None:
                whole[rows_] = value
            else:
                whole[np.ix_(rows_, t.slice.inp)] = value
    tuned = mo.apply(model, plan)
    optimizer = torch_optimizer(plan.optimizer, tuned, plan)
    tuned.train()
    for i in range(n):
        loss = torch.nn.functional.cross_entropy(
            tuned(torch.from_numpy(runner.x[[i]])), torch.tensor([int(runner.y[i])])
        )
        assert records[learned + forgotten + 2 + i].loss == pytest.approx(loss.item(), rel=1e-4)
        (loss / every).backward()
        if (i + 1) % every == 0:
            update(optimizer, tuned)
    at = 0
    for t in plan.program.learned:
        got = from_c(records[-1].values[at : at + t.size], t.shape, t.layout)
        at += t.size
        want = tuned.moving[t.param].detach().numpy()
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), t.param


# ---- the interface ---------------------------------------------------------------------------


OLD_PLACE = """
#include "model.h"
static model_t net, other;
int main(void)
{
  static float x[MODEL_INPUTS];
  float a = 0.0f, b = 0.0f;
  int moved = 0;
  model_init(&net);
  model_init(&other);
  float *const place = model_input(&net);
  for (int step = 0; step < 6; step++) {
    for (int i = 0; i < MODEL_INPUTS; i++) {
      place[i] = x[i] = (float)((i * 7 + step * 3) % 11) / 5.0f - 1.0f;
    }
    moved += place != model_input(&net);
    if (model_train(&net, place, step % 4, &a) != 0 || model_train(&other, x, step % 4, &b) != 0 ||
        a != b) {
      return 1;
    }
  }
  return moved > 0 ? 0 : 2;
}
"""


def test_where_an_earlier_step_had_its_input_a_sample_is_still_taken_from(workshop, tmp_path):
    """The place of the input may differ by pattern; what is written to an old one is moved."""
    folder = workshop.emit(build(STEPS[1]))
    done = workshop.make(folder, "sanitize-fast", "build/sanitize-fast/main")
    assert done.returncode == 0, done.stderr
    (tmp_path / "old.c").write_text(OLD_PLACE)
    made = folder / "build/sanitize-fast"
    objects = [*made.glob("model*.o"), *made.glob("kernels/*.o")]
    subprocess.run(
        ["gcc", "-fsanitize=address,undefined", f"-I{folder}", f"-I{folder / 'kernels'}",
         str(tmp_path / "old.c"), *map(str, objects), "-o", str(tmp_path / "old")], check=True,
    )  # fmt: skip
    ran = subprocess.run([str(tmp_path / "old")], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_clearing_steps_is_part_of_the_interface_where_steps_differ_only(workshop: Workshop):
    folder = workshop.emit(build(STEPS[1]))
    net = workshop.native(folder)
    text = (folder / "model.h").read_text()
    assert "#define MODEL_INNER_STEPS 4\n" in text and "int model_steps_clear(" in text
    names = subprocess.run(
        ["nm", "-D", "--defined-only", str(folder / "build/host-parity/libmodel.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert {line.split()[-1] for line in names.splitlines()} == {
        f"model_{name}"
        for name in ("init", "input", "predict", "train", "export_state", "import_state", "trained",
                     "size", "error", "steps_clear")
    }  # fmt: skip
    net._memory.raw = bytes(len(net._memory))
    with pytest.raises(mo.ModicumError, match="not initialised"):
        net.clear_steps()
    assert not net._call["input"](net._net)
    alike = mo.plan(build(STEPS[1]).graph, None, mo.Last(n=1))
    one = mo.emit(build(STEPS[1]).model, alike, workshop.root / "alike")
    assert "steps" not in (one / "model.h").read_text()
    with pytest.raises(UsageError, match="no step sizes that differ by inner step"):
        workshop.native(one).clear_steps()


def test_a_pattern_is_a_file_of_its_own_and_the_readme_tells(workshop: Workshop):
    built = build(STEPS[1])
    folder = workshop.emit(built)
    n = len(built.plan.patterns)
    assert n == 4
    for i in range(n):
        text = (folder / f"model_pattern{i}.c").read_text()
        assert "static void forward(model_t *m" in text and "static void start(" not in text
    assert "mo_conv2d" not in (folder / "model.c").read_text()
    readme = (folder / "README.md").read_text()
    assert "4 inner steps have step sizes of their own" in readme
    assert "`model_pattern*.c`" in readme and "`model_steps_clear`" in readme
    assert mo.Plan.load(folder / "plan.json") == built.plan


@pytest.mark.parametrize("case", [STEPS[1], SLICES, RATES], ids=lambda case: case.id)
def test_gcc_and_clang_compile_the_patterns_without_a_warning(workshop, case, tmp_path):
    folder = workshop.emit(build(case))
    sources = [str(p) for p in folder.glob("model*.c")]
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wvla",
             "-Wundef", "-Wcast-qual", "-Wstrict-prototypes", "-Wdouble-promotion", "-Werror",
             f"-I{folder}", f"-I{folder / 'kernels'}", "-fsyntax-only"]  # fmt: skip
    for compiler in filter(shutil.which, ("gcc", "clang")):
        subprocess.run([compiler, *flags, *sources], check=True, cwd=tmp_path)
