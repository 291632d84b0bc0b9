import os
from pathlib import Path

import pytest
from emit.folders import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Workshop(Path(tmp_path_factory.mktemp("folders")), shared / "compiled-kernels")
