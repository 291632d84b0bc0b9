import os
from pathlib import Path

import pytest
import torch
from emit.folders import Workshop


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    base = tmp_path_factory.getbasetemp()
    # under xdist the parent belongs to this run and is the same for every worker
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Workshop(Path(tmp_path_factory.mktemp("folders")), shared / "compiled-kernels")
