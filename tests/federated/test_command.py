"""modicum federate, as a user types it."""

from __future__ import annotations

import json

import pytest

from modicum import cli

OWN = """
from torch import nn
from federated.lines import Lines, make_net
from modicum.federated.cases import Case

def lines():
    return Case(
        make_net, lambda paths, seed: Lines(), (2,), "mse", "none", local=("head.*",), rate=0.05,
        rate_local=0.05, query=8, start=1.0, shots=4, tune=2,
    )

def number():
    return 7
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


@pytest.fixture
def command(capsys, monkeypatch):
    """(exit code, what was on stdout) of a command line."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["modicum", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out + out.err

    return run


def test_a_case_of_ones_own_is_federated(command, own, tmp_path):
    words = ("federate", f"{own}:lines", "--rule", "tinymetafed:top=0.5,clients=2", "--rounds", "6",
             "--learner", "torch", "--judge-every", "3", "--out", str(tmp_path / "f"))  # fmt: skip
    code, said = command(*words)
    assert code == 0, said
    assert "tinymetafed: 6 rounds, 24 parameters shared, 9 kept by clients" in said
    names = {p.name for p in (tmp_path / "f").iterdir()}
    assert {"weights.npz", "history.json", "history.jsonl", "server.npz", "curve.svg"} <= names
    code, again = command(*words, "--json")
    made = json.loads(again)
    assert code == 0 and len(made["rounds"]) == 6, "a rerun finds it done"
    assert made["rule"]["top"] == 0.5 and made["rule"]["local"] == ["head.*"]
    assert made["rule"]["rate"] == 0.05, "the case's"
    code, said = command(*words[:3], "fedavg", *words[4:])
    assert code == 1 and "another rule" in said


def test_what_is_wrong_is_said(command, own):
    for words, why in (
        (("clouds",), "no use case is called 'clouds'"),
        ((f"{own}:number",), "returns int, not a federated.Case"),
        ((f"{own}:nothing",), "does not make a use case"),
        (("sines", "--rule", "fedsgd"), "no federated method is called 'fedsgd'"),
        (("sines", "--rule", "fedavg:top=2"), "less than or equal to 1"),
        (("sines", "--rule", "tinymetafed:local=tail.*"), "to be local"),
        (("sines", "--learner", "cloud"), "learner"),
        (("words",), ".npz"),
    ):
        code, said = command("federate", *words, "--rounds", "1")
        assert code == 2 and why in said, said
