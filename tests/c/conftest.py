import pytest
from c.kernels import PARITY, Kernels, build


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Kernels:
    return Kernels(build(tmp_path_factory.mktemp("parity"), PARITY))
