"""export_state and import_state: training goes on bit by bit, and a bad blob changes nothing."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, Built, build
from emit.folders import Workshop, execute
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.job import EXPORT, IMPORT, PAINT, PARAMETERS, TRAIN, Job, Result
from modicum.state import image_to_c

HEAD, PLAN, LENGTH, COLLECTED, C1, C2, PAYLOAD = 4, 8, 24, 32, 36, 40, 44
WANTED = (
    "groups-slices-Adam-x3",
    "mobile-Full-Momentum-x3",
    "mobile-batch-Adam-x3",
    "mlp-Full-SGD",
    "regression-Full-Adam-x2",
    "few_shot-slices-Adam-x3",
)


@dataclass
class Runner:
    """A net's job runner, built with the sanitizers."""

    built: Built
    program: Path
    scratch: Path

    def job(self) -> Job:
        graph = self.built.graph
        outputs = graph.values[graph.output].size
        targets = outputs if self.built.plan.loss == "mse" else 0
        return Job(graph.values[graph.input].size, targets, PAINT | PARAMETERS)

    def train(self, job: Job, steps: range) -> None:
        x, y = self.built.samples(16)
        images = image_to_c(x.numpy())
        for i in steps:
            if self.built.plan.loss == "mse":
                job.train(images[i], target=y[i].numpy())
            else:
                job.train(images[i], int(y[i]))

    def run(self, job: Job) -> Result:
        result, said = execute(self.program, job, self.scratch)
        assert result is not None, said
        assert "Sanitizer" not in said and "runtime error" not in said, said
        return result


@pytest.fixture(scope="module", params=WANTED)
def runner(request, workshop: Workshop, tmp_path_factory) -> Runner:
    built = build(next(c for c in CASES if c.id == request.param))
    folder = workshop.emit(built)
    done = workshop.make(folder, "sanitize-fast", "build/sanitize-fast/main")
    assert done.returncode == 0, done.stderr
    return Runner(built, folder / "build/sanitize-fast/main", tmp_path_factory.mktemp("jobs"))


def test_training_goes_on_bit_by_bit_after_export_and_import(runner: Runner):
    through, before, after = runner.job(), runner.job(), runner.job()
    runner.train(through, range(12))
    through.export_state()
    runner.train(before, range(5))  # in the middle of an accumulation
    before.export_state()
    blob = runner.run(before).records[-1].blob
    after.import_state(blob)
    runner.train(after, range(5, 12))
    after.export_state()
    whole, rest = runner.run(through).records, runner.run(after).records
    assert rest[0].status == 0
    for a, b in zip(whole[5:12], rest[1:8], strict=True):
        assert a.loss == b.loss and a.values.tobytes() == b.values.tobytes()
    assert whole[-1].blob == rest[-1].blob


def test_an_exported_state_says_what_it_is(runner: Runner):
    job = runner.job()
    runner.train(job, range(4))
    job.export_state()
    blob = runner.run(job).records[-1].blob
    plan = runner.built.plan
    assert blob[:4] == b"MOST"
    assert blob[PLAN : PLAN + 16].hex() == plan.hash[:32]
    assert word(blob, LENGTH) == len(blob) - PAYLOAD - 4
    assert word(blob, 28) == 4 // plan.accumulate  # updates
    assert word(blob, COLLECTED) == 4 % plan.accumulate
    assert word(blob, len(blob) - 4) == zlib.crc32(blob[:-4])
    assert accepts(runner.built, blob)


def test_a_bad_blob_is_refused_and_changes_nothing_and_a_good_one_is_taken_whole(runner: Runner):
    job = runner.job()
    runner.train(job, range(4))
    job.export_state()
    good = runner.run(job).records[-1].blob

    @settings(max_examples=25)
    @given(st.lists(blobs(runner.built, good), min_size=1, max_size=20))
    def check(tried: list[bytes]) -> None:
        job = runner.job()
        runner.train(job, range(4))
        for blob in tried:
            job.import_state(blob)
            job.export_state()
        runner.train(job, range(4, 6))
        records = runner.run(job).records
        state = good
        kinds = [r.kind for r in records]
        assert kinds == [TRAIN] * 4 + [IMPORT, EXPORT] * len(tried) + [TRAIN] * 2
        for i, blob in enumerate(tried):
            status, exported = records[4 + 2 * i].status, records[5 + 2 * i].blob
            if accepts(runner.built, blob):
                assert status == 0
                state = blob
            else:
                assert status < 0
            assert exported == state

    check()


REFUSED = {
    "empty": (lambda b: b"", -5),
    "one byte short": (lambda b: b[:-1], -5),
    "one byte long": (lambda b: b + b"\0", -5),
    "another magic": (lambda b: b"MOSX" + b[4:], -6),
    "another version": (lambda b: signed(b[:HEAD] + struct.pack("<I", 2) + b[PLAN:]), -6),
    "another plan": (lambda b: signed(b[:PLAN] + bytes(16) + b[LENGTH:]), -7),
    "another length": (lambda b: signed(b[:LENGTH] + struct.pack("<I", 8) + b[28:]), -5),
    "a damaged byte": (lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:], -8),
    "a damaged checksum": (lambda b: b[:-1] + bytes([b[-1] ^ 1]), -8),
    "not a number": (lambda b: with_float(b, PAYLOAD, math.nan), -9),
    "infinite at the end": (lambda b: with_float(b, len(b) - 8, math.inf), -9),
    "too many collected": (lambda b: signed(b[:COLLECTED] + b"\xff" * 4 + b[C1:]), -9),
    "a correction above one": (lambda b: with_float(b, C1, 1.5), -9),
    "a negative correction": (lambda b: with_float(b, C2, -0.5), -9),
    "a correction that is no number": (lambda b: with_float(b, C2, math.nan), -9),
}


def test_each_kind_of_bad_blob_gets_its_own_status(runner: Runner):
    first = runner.job()
    runner.train(first, range(3))
    first.export_state()
    good = runner.run(first).records[-1].blob
    job = runner.job()
    for spoil, _ in REFUSED.values():
        job.import_state(spoil(good))
    statuses = [r.status for r in runner.run(job).records]
    assert dict(zip(REFUSED, statuses, strict=True)) == {k: s for k, (_, s) in REFUSED.items()}


def test_a_second_moment_or_a_running_variance_below_zero_or_no_number_is_refused(runner: Runner):
    first = runner.job()
    runner.train(first, range(3))
    first.export_state()
    good = runner.run(first).records[-1].blob
    job, runs = runner.job(), never_negative(runner.built)
    for at, n in runs:
        job.import_state(with_float(good, PAYLOAD + at, -1.0))
        job.import_state(with_float(good, PAYLOAD + at + 4 * (n - 1), -1e-38))
        job.import_state(with_float(good, PAYLOAD + at, math.nan))
    job.export_state()
    *refused, unchanged = runner.run(job).records
    assert [r.status for r in refused] == [-9] * (3 * len(runs))
    fresh = runner.job()
    fresh.export_state()
    assert unchanged.blob == runner.run(fresh).records[0].blob
    plan = runner.built.plan
    norms = sum(n.op == "batch_stat_norm" for n in plan.program.graph.nodes)
    assert len(runs) == norms + len(plan.program.trained) * (plan.optimizer.kind == "adam")


def test_a_sample_whose_loss_is_not_finite_changes_nothing_not_even_statistics(runner: Runner):
    graph, plan = runner.built.graph, runner.built.plan
    target = np.zeros(graph.values[graph.output].size if plan.loss == "mse" else 0, np.float32)
    job = runner.job()
    runner.train(job, range(4))
    job.export_state()
    for value in (3e38, -3e38):
        job.train(np.full(graph.values[graph.input].size, value, np.float32), 0, target)
    job.export_state()
    runner.train(job, range(4, 6))
    records = runner.run(job).records
    statuses = [r.status for r in records[5:7]]
    norms = any(n.op == "batch_stat_norm" for n in plan.program.graph.nodes)
    if norms:  # a clamp without a norm before it can bring it back
        assert statuses == [-4, -4]
    if statuses == [-4, -4]:
        assert records[4].blob == records[7].blob
    assert [r.status for r in records[8:]] == [0, 0]


def test_bad_samples_are_refused_and_change_nothing(runner: Runner):
    graph, mse = runner.built.graph, runner.built.plan.loss == "mse"
    size, outputs = graph.values[graph.input].size, graph.values[graph.output].size
    x, target = np.zeros(size, np.float32), np.zeros(outputs if mse else 0, np.float32)
    job = runner.job()
    runner.train(job, range(4))
    job.export_state()
    bad = []
    for value in (np.nan, np.inf, -np.inf):
        for at in (0, size - 1):
            spoiled = x.copy()
            spoiled[at] = value
            job.train(spoiled, 0, target)
            job.predict(spoiled)
            bad += [-2, -2]
    if mse:
        spoiled = target.copy()
        spoiled[-1] = np.nan
        job.train(x, 0, spoiled)
        bad += [-2]
    else:
        for label in (-1, outputs, 2**31 - 1, -(2**31)):
            job.train(x, label)
            bad += [-3]
    job.export_state()
    runner.train(job, range(4, 5))
    records = runner.run(job).records
    assert [r.status for r in records[5:-2]] == bad
    assert records[4].blob == records[-2].blob
    assert records[-1].status == 0


# ---- blobs -----------------------------------------------------------------------------------


def blobs(built: Built, good: bytes) -> st.SearchStrategy[bytes]:
    """Random ones, and mutations of a good one, some with a checksum that is right."""
    at = st.integers(0, len(good) - 1)
    flips = st.lists(st.tuples(at, st.integers(1, 255)), min_size=1, max_size=4).map(
        lambda changes: flipped(good, changes)
    )
    words = st.tuples(
        st.integers(0, len(good) // 4 - 2),
        st.sampled_from([0, 1, 2, 3, 0x7F800000, 0x7FC00000, 0xFF800000, 0x80000000, 0xBF800000,
                         0x3F800000, 0xFFFFFFFF, 0x00000001]),
    ).map(lambda change: good[: 4 * change[0]] + struct.pack("<I", change[1])
          + good[4 * change[0] + 4 :])  # fmt: skip
    runs = [at for at, _ in never_negative(built)] or [0]
    negative = st.sampled_from(runs).map(lambda at: with_float(good, PAYLOAD + at, -2.0))
    return st.one_of(
        st.binary(max_size=len(good) + 40),
        st.integers(0, len(good)).map(lambda n: good[:n]),
        st.binary(min_size=1, max_size=40).map(lambda tail: good + tail),
        flips,
        flips.map(signed),
        words,
        words.map(signed),
        negative,
        st.just(good),
        st.just(signed(good[:PLAN] + b"x" * 16 + good[LENGTH:])),
    )


def accepts(built: Built, blob: bytes) -> bool:
    """What a net of this plan may import, written down a second time."""
    learned = max(
        built.plan.offsets[b.name] + b.bytes
        for b in built.plan.program.buffers.values()
        if b.persistent
    )
    if len(blob) != PAYLOAD + learned + 4 or blob[:8] != b"MOST" + struct.pack("<I", 1):
        return False
    if blob[PLAN:LENGTH] != bytes.fromhex(built.plan.hash[:32]) or word(blob, LENGTH) != learned:
        return False
    if zlib.crc32(blob[:-4]) != word(blob, len(blob) - 4):
        return False
    corrections = struct.unpack_from("<2f", blob, C1)
    if word(blob, COLLECTED) >= built.plan.accumulate or not all(0 <= c <= 1 for c in corrections):
        return False
    payload = np.frombuffer(blob[PAYLOAD:-4], "<f4")
    runs = never_negative(built)
    return bool(np.isfinite(payload).all()) and all(
        (payload[at // 4 : at // 4 + n] >= 0).all() for at, n in runs
    )


def never_negative(built: Built) -> list[tuple[int, int]]:
    """(offset, count) of running variances and Adam's second moments."""
    plan, program = built.plan, built.plan.program
    variances = [t for t in program.statistics if t.param.endswith("running_var")]
    runs = [(plan.offsets[t.buffer], t.size) for t in variances]
    if plan.optimizer.kind == "adam":
        runs += [(plan.offsets[f"v:{t.param}"], t.size) for t in program.trained]
    return runs


def word(blob: bytes, at: int) -> int:
    return struct.unpack_from("<I", blob, at)[0]


def with_float(blob: bytes, at: int, value: float) -> bytes:
    return signed(blob[:at] + struct.pack("<f", value) + blob[at + 4 :])


def flipped(blob: bytes, changes: list[tuple[int, int]]) -> bytes:
    mutable = bytearray(blob)
    for at, mask in changes:
        mutable[at] ^= mask
    return bytes(mutable)


def signed(blob: bytes) -> bytes:
    return blob[:-4] + struct.pack("<I", zlib.crc32(blob[:-4]))
