from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modicum import InvalidInput
from modicum.errors import UsageError
from modicum.federated import codec
from modicum.federated.codec import OVERHEAD, Message, decode, encode, encoded_size, largest

MODEL = bytes(range(16))
finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def messages(draw):
    size = draw(st.sampled_from([1, 7, 64, 300, 70_000]))
    where = None
    if draw(st.booleans()):
        few = draw(st.sets(st.integers(0, size - 1), max_size=40))
        where = np.array(sorted(few), np.int64)
    count = size if where is None else len(where)
    if count <= 300:
        values = draw(hnp.arrays(np.float32, count, elements=finite))
    else:
        values = np.random.default_rng(draw(st.integers(0, 99))).normal(size=count)
    return Message(
        draw(st.sampled_from(["weights", "delta"])), MODEL, draw(st.integers(0, 2**32 - 1)), size,
        values.astype(np.float32), where, draw(st.integers(0, 99)),
    )  # fmt: skip


def read(blob, message, **given):
    return decode(blob, model=MODEL, size=message.size, kind=message.kind, **given)


@given(messages())
def test_a_message_comes_back_as_it_was(message):
    blob = encode(message)
    found = read(blob, message, round=message.round)
    assert np.array_equal(found.values, message.values)
    assert (found.where is None) == (message.where is None)
    if message.where is not None:
        assert np.array_equal(found.where, message.where)
    assert (found.round, found.base, found.kind) == (message.round, message.base, message.kind)
    assert len(blob) == encoded_size(message.size, len(message.values), dense=message.where is None)


@given(messages(), st.sampled_from(["float16", "int8"]))
def test_smaller_values_round_and_nothing_else_changes(message, values):
    blob = encode(message, values)
    found = read(blob, message)
    most = np.abs(message.values).max(initial=0)
    if values == "int8":
        assert np.abs(found.values - message.values).max(initial=0) <= most / 127 * 0.5001 + 1e-40
    else:
        with np.errstate(over="ignore"):
            half = message.values.clip(-65504, 65504).astype(np.float16)
        assert np.array_equal(found.values, half.astype(np.float32))
    dense = message.where is None
    assert len(blob) == encoded_size(message.size, len(message.values), values, dense=dense)


@given(messages(), st.data())
def test_a_damaged_or_cut_message_is_refused(message, data):
    blob = bytearray(encode(message))
    at = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(InvalidInput, match="refused"):
        read(bytes(blob[:at]), message)
    blob[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(InvalidInput, match="refused"):
        read(bytes(blob), message)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw):
    for blob in (raw, signed(raw)):
        try:
            decode(blob, model=MODEL, size=16, kind="delta")
        except InvalidInput:
            continue


@given(st.data())
def test_any_contents_with_a_right_crc_are_read_or_refused(data):
    """What a client that means harm could send: every field drawn, the CRC computed."""
    head = codec.HEAD.pack(
        b"MOFU", 1, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3)),
        data.draw(st.integers(0, 4)), 3, 0, MODEL[:8], data.draw(st.sampled_from([16, 17])),
        data.draw(st.integers(0, 2**32 - 1) | st.integers(0, 17)),
    )  # fmt: skip
    blob = signed(head + data.draw(st.binary(max_size=120)))
    try:
        found = decode(blob, model=MODEL, size=16, kind="delta", round=3, limit=10.0)
    except InvalidInput:
        return
    dense = found.dense()
    assert dense.shape == (16,) and np.isfinite(dense).all() and np.abs(dense).max() <= 10


def signed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"model": bytes(16)}, "another model"),
        ({"size": 9}, "another size"),
        ({"kind": "weights"}, "holds delta"),
        ({"round": 4}, "another round"),
        ({"limit": 1.5}, "out of range"),
    ],
)
def test_what_was_not_due_is_refused_with_the_reason(given, why):
    blob = encode(Message("delta", MODEL, 3, 8, np.full(8, 2, np.float32)))
    due = {"model": MODEL, "size": 8, "kind": "delta", "round": 3} | given
    with pytest.raises(InvalidInput, match=why):
        decode(blob, **due)


def test_values_that_are_not_finite_are_neither_sent_nor_taken():
    bad = np.array([1, np.nan], np.float32)
    with pytest.raises(InvalidInput, match="not finite"):
        encode(Message("delta", MODEL, 1, 2, bad))
    blob = encode(Message("delta", MODEL, 1, 2, np.ones(2, np.float32)))
    for value in (np.inf, np.nan):
        forged = blob[: codec.HEAD.size] + np.array([1, value], "<f4").tobytes()
        with pytest.raises(InvalidInput, match="not finite"):
            decode(signed(forged), model=MODEL, size=2, kind="delta")
    scale = encode(Message("delta", MODEL, 1, 2, np.ones(2, np.float32)), "int8")
    forged = scale[: codec.HEAD.size] + struct.pack("<f", np.inf) + b"\x01\x01"
    with pytest.raises(InvalidInput, match="not finite"):
        decode(signed(forged), model=MODEL, size=2, kind="delta")


def test_the_cheapest_index_is_taken():
    def index(size, count):
        where = np.arange(count)
        blob = encode(Message("delta", MODEL, 1, size, np.ones(count, np.float32), where))
        return len(blob) - OVERHEAD - 4 * count

    assert index(1600, 10) == 20  # 16 bits each
    assert index(1600, 200) == 200  # a bitmap
    assert index(100_000, 10) == 40  # 32 bits each
    assert index(100_000, 99_999) == 12_500


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=finite), st.floats(0.01, 1))
def test_the_largest_entries_are_kept(delta, share):
    where = largest(delta, share)
    if where is None:
        assert share >= 1
        return
    kept = np.abs(delta[where])
    rest = np.abs(np.delete(delta, where))
    wanted = min(int(np.ceil(share * len(delta))), int((delta != 0).sum()))
    assert len(where) == wanted and (np.diff(where) > 0).all()
    assert not len(rest) or not len(kept) or kept.min() >= rest.max()


def test_all_of_a_change_is_the_dense_message():
    delta = np.array([0, 3, -1, 0], np.float32)
    assert largest(delta, 1.0) is None
    whole = Message("delta", MODEL, 1, 4, delta)
    part = Message("delta", MODEL, 1, 4, delta[[1, 2]], np.array([1, 2]))
    for message in (whole, part):
        assert np.array_equal(read(encode(message), message).dense(), delta)


def test_positions_out_of_order_are_an_error_of_the_caller():
    with pytest.raises(UsageError, match="ascending"):
        encode(Message("delta", MODEL, 1, 4, np.ones(2, np.float32), np.array([2, 1])))
