"""Job and trace files: what is written is what the C side reads, and a cut file is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InvalidInput
from modicum.job import (
    ADD,
    CLEAR,
    EXPORT,
    IMPORT,
    MICROSECONDS,
    PARAMETERS,
    PREDICT,
    SELECT,
    TRAIN,
    Job,
    decode,
)


def test_a_job_is_a_header_and_its_records_in_little_endian_words():
    job = Job(inputs=2, targets=0, flags=3)
    job.predict(np.array([1.0, 2.0], np.float32))
    job.train(np.array([[3.0], [4.0]], np.float32), label=-1)
    job.export_state()
    job.import_state(b"abcde")
    job.clear_prototypes()
    job.add_prototype(np.array([5.0, 6.0], np.float32), label=3)
    job.select(-2)
    assert job.encode() == (
        struct.pack("<4s5I", b"MOJB", 1, 2, 0, 3, 7)
        + struct.pack("<2I2f", PREDICT, 0, 1.0, 2.0)
        + struct.pack("<Ii2f", TRAIN, -1, 3.0, 4.0)
        + struct.pack("<2I", EXPORT, 0)
        + struct.pack("<3I8s", IMPORT, 0, 5, b"abcde\0\0\0")
        + struct.pack("<2I", CLEAR, 0)
        + struct.pack("<Ii2f", ADD, 3, 5.0, 6.0)
        + struct.pack("<Ii", SELECT, -2)
    )


def test_targets_stand_before_the_inputs():
    job = Job(inputs=1, targets=2, flags=0)
    job.train(np.ones(1, np.float32), target=np.array([5.0, 6.0], np.float32))
    job.add_prototype(np.ones(1, np.float32), label=1)
    assert job.encode()[24:] == (
        struct.pack("<2I3f", TRAIN, 0, 5.0, 6.0, 1.0) + struct.pack("<2I3f", ADD, 1, 0, 0, 1.0)
    )


@pytest.mark.parametrize(("x", "target"), [(1, 2), (3, 2), (2, 1), (2, 0)])
def test_a_sample_of_another_size_is_refused(x, target):
    job = Job(inputs=2, targets=2)
    with pytest.raises(InvalidInput, match=f"a sample has {x} values and {target} targets"):
        job.train(np.zeros(x, np.float32), target=np.zeros(target, np.float32))


def trace(flags: int = PARAMETERS | MICROSECONDS) -> bytes:
    records = [
        struct.pack("<Iif", PREDICT, 0, 0.0) + struct.pack("<I2f", 11, 0.5, -0.5),
        struct.pack("<Iif", PREDICT, -2, 0.0) + struct.pack("<I", 12),
        struct.pack("<Iif", TRAIN, 0, 1.25) + struct.pack("<I3f", 13, 1, 2, 3),
        struct.pack("<Iif", EXPORT, 0, 0.0) + struct.pack("<2I8s", 14, 5, b"hello\0\0\0"),
        struct.pack("<Iif", EXPORT, -1, 0.0) + struct.pack("<I", 15),
        struct.pack("<Iif", IMPORT, -8, 0.0) + struct.pack("<I", 16),
        struct.pack("<Iif", CLEAR, 0, 0.0) + struct.pack("<I", 17),
        struct.pack("<Iif", ADD, -10, 0.0) + struct.pack("<I", 18),
        struct.pack("<Iif", SELECT, -11, 0.0) + struct.pack("<I", 19),
        struct.pack("<Iif", SELECT, 0, 0.0) + struct.pack("<2I", 20, 1),
        struct.pack("<Iif", TRAIN, 0, 0.5) + struct.pack("<If", 21, 7),
    ]
    head = struct.pack("<4s5I", b"MOTR", 1, 2, 3, 64, flags)
    return (
        head + b"".join(records) + b"MOND" + struct.pack("<9I", 60, 700, 1024, 8, 16, 96, 6, 0, 5)
    )


def test_a_trace_is_read_record_by_record():
    result = decode(trace())
    assert [(r.kind, r.status, r.elapsed) for r in result.records] == [
        (PREDICT, 0, 11), (PREDICT, -2, 12), (TRAIN, 0, 13), (EXPORT, 0, 14), (EXPORT, -1, 15),
        (IMPORT, -8, 16), (CLEAR, 0, 17), (ADD, -10, 18), (SELECT, -11, 19), (SELECT, 0, 20),
        (TRAIN, 0, 21),
    ]  # fmt: skip
    assert result.records[0].values.tolist() == [0.5, -0.5]
    assert result.records[1].values.size == 0
    assert result.records[2].values.tolist() == [1, 2, 3] and result.records[2].loss == 1.25
    assert result.records[3].blob == b"hello" and result.records[4].blob == b""
    assert result.records[-1].values.tolist() == [7]  # as many as the selected member trains
    assert (result.arena, result.arena_high_water) == (64, 60)
    assert (result.stack_high_water, result.net) == (700, 96)
    assert result.microseconds and result.peak_rss == 5 * 1024


def test_a_trace_that_is_cut_short_anywhere_is_refused():
    whole = trace()
    for n in range(len(whole)):
        with pytest.raises(InvalidInput, match=r"cut short|no trace"):
            decode(whole[:n])


@given(st.binary(max_size=200))
def test_what_is_not_a_trace_is_refused(data):
    with pytest.raises(InvalidInput):
        decode(data)
    with pytest.raises(InvalidInput):
        decode(b"MOTR" + data.replace(b"MOND", b"mond"))
