"""Compile the C kernels into a shared library and call them with numpy arrays."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SOURCE_DIR = Path(__file__).parents[2] / "src" / "modicum" / "emit" / "c"
SOURCES = sorted(SOURCE_DIR.glob("*.c"))

WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
PARITY = ["-O2", "-ffp-contract=off", "-fno-math-errno"]


def build(folder: Path, flags: list[str], compiler: str = "gcc") -> Path:
    """Compile every kernel with `flags`; return the shared library."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = [compiler, "-std=c99", "-fPIC", *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = folder / "libkernels.so"
    subprocess.run([compiler, "-shared", *flags, *objects, "-o", str(library)], check=True)
    return library


class Geometry(ctypes.Structure):
    """mo_conv_t"""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "in_h in_w in_c out_h out_w out_c k_h k_w stride_h stride_w "
            "pad_t pad_l dil_h dil_w groups"
        ).split()
    ]


class Window(ctypes.Structure):
    """mo_pool_t"""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "in_h in_w c out_h out_w k_h k_w stride_h stride_w pad_t pad_l pad_b pad_r dil_h dil_w"
        ).split()
    ]


class Kernels:
    """The library's functions by their C names.

    A numpy array is passed as a pointer, an int as int32_t, a float as float, a structure by
    reference and None as NULL.
    """

    RESULTS = {
        "mo_exp": ctypes.c_float,
        "mo_log": ctypes.c_float,
        "mo_cross_entropy": ctypes.c_float,
        "mo_mse": ctypes.c_float,
        "mo_all_finite": ctypes.c_int,
        "mo_prototype_add": ctypes.c_int,
        "mo_crc32": ctypes.c_uint32,
    }

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str):
        function = getattr(self.library, name)
        function.restype = self.RESULTS.get(name)

        def call(*arguments):
            return function(*map(_to_c, arguments))

        setattr(self, name, call)
        return call


def _to_c(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, (bool, int, np.integer)):
        return ctypes.c_int32(int(value))
    if isinstance(value, (float, np.floating)):
        return ctypes.c_float(value)
    return value
