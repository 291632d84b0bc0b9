import json
import pickle

import pytest

from modicum import errors


def test_an_error_reads_as_what_then_aligned_details():
    error = errors.DoesNotFit(
        "bias-only needs 513.0 KiB, board nano33ble has 232.0 KiB for it.",
        floor="504.0 KiB (inference alone)",
        why="no choice of updated layers goes below the inference peak",
        hint=["--input 1x3x64x64", "a narrower model"],
    )
    assert error.render() == (
        "DoesNotFit: bias-only needs 513.0 KiB, board nano33ble has 232.0 KiB for it.\n"
        "  floor  504.0 KiB (inference alone)\n"
        "  why    no choice of updated layers goes below the inference peak\n"
        "  try    --input 1x3x64x64\n"
        "         a narrower model"
    )


def test_a_long_label_widens_all_and_a_missing_detail_is_left_out():
    error = errors.UsageError("no.", operators="a\nb", where=None, why="c")
    assert str(error) == "no.\n  operators  a\n             b\n  why        c"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ModicumError, 1),
        (errors.UsageError, 2),
        (errors.DoesNotFit, 3),
        (errors.UnsupportedOperator, 4),
        (errors.ParityError, 5),
        (errors.InvalidInput, 1),
        (errors.ToolMissing, 1),
        (errors.Bug, 70),
    ],
)
def test_every_error_has_its_exit_code_and_goes_to_json_and_to_another_process(kind, code):
    error = kind("it broke.", where="here", hint=["a", "b"])
    assert isinstance(error, errors.ModicumError)
    assert json.loads(json.dumps(error.as_dict())) == {
        "error": kind.__name__,
        "exit_code": code,
        "what": "it broke.",
        "where": "here",
        "try": "a\nb",
    }
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.render() == error.render()


def test_a_bug_asks_to_be_reported():
    assert "report" in errors.Bug("offset -4.").render()
