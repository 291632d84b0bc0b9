"""Run every generated kernel call through one library: `python -m c.kernel_replay libkernels.so`.

Meant for a sanitized library, in a process of its own with the sanitizer preloaded, so that every
numpy array is a heap block of its exact size.
"""

import sys
from pathlib import Path

from c.kernel_cases import OPS, Op, examples
from c.kernels import Kernels
from hypothesis import given
from hypothesis.strategies import data


def replay(library: Path) -> None:
    kernels = Kernels(library)
    for op in OPS.values():
        _replay_op(kernels, op)


@examples
@given(data())
def _replay_op(kernels: Kernels, op: Op, drawn) -> None:
    op.run(kernels, **drawn.draw(op.cases))


if __name__ == "__main__":
    replay(Path(sys.argv[1]))
