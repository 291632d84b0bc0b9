import sys
from types import SimpleNamespace

import pytest
import torch

from modicum import cli


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def modicum(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["modicum", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=out, err=err)

    return call
