"""What must hold for every way of compiling the kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from c.kernel_cases import OPS, examples
from c.kernels import PARITY, SOURCE_DIR, SOURCES, WARNINGS, Kernels, build
from hypothesis import given

COMPILERS = {
    "gcc": ["gcc", "-O2"],
    "gcc, scalar": ["gcc", "-O2", "-DMO_LANES=1"],
    "clang": ["clang", "-O2"],
    "clang, native": ["clang", "-O2", "-march=native"],
    "cortex-m0": ["arm-none-eabi-gcc", "-O2", "-mthumb", "-mcpu=cortex-m0"],
    "cortex-m4": ["arm-none-eabi-gcc", "-O2", "-mthumb", "-mcpu=cortex-m4", "-mfloat-abi=hard"]
    + ["-mfpu=fpv4-sp-d16", "-Wdouble-promotion"],
    "cortex-m7": ["arm-none-eabi-gcc", "-Os", "-mthumb", "-mcpu=cortex-m7", "-mfloat-abi=hard"],
    "cortex-m55": ["arm-none-eabi-gcc", "-O3", "-mthumb", "-mcpu=cortex-m55", "-mfloat-abi=hard"],
}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_kernels_compile_without_a_warning(tmp_path, compiler):
    command, *flags = COMPILERS[compiler]
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    flags = [*flags, *WARNINGS, "-Wshadow", "-Wvla"]
    subprocess.run([command, *flags, "-c", *map(str, SOURCES)], check=True, cwd=tmp_path)


def test_header_compiles_as_cpp(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    header = SOURCE_DIR / "mo_kernels.h"
    flags = ["-x", "c++", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run(["g++", *flags, str(header)], check=True, cwd=tmp_path)


@pytest.fixture(scope="module")
def builds(tmp_path_factory, kernels) -> dict[str, Kernels]:
    """Other widths, optimisation levels and compilers; the bits may not depend on any."""
    flags = {
        "1 lane": ["gcc", "-O2", "-DMO_LANES=1"],
        "4 lanes": ["gcc", "-O2", "-DMO_LANES=4"],
        "8 lanes": ["gcc", "-O3", "-march=native", "-DMO_LANES=8"],
        "16 lanes": ["gcc", "-O3", "-march=native", "-DMO_LANES=16"],
    }
    if shutil.which("clang"):
        flags["clang"] = ["clang", "-O3", "-march=native"]
    folder = tmp_path_factory.mktemp("builds")
    return {
        name: Kernels(build(folder / name.replace(" ", "-"), [*PARITY, *extra], compiler))
        for name, (compiler, *extra) in flags.items()
    }


@pytest.mark.parametrize("name", OPS)
def test_builds_agree_to_the_bit(kernels, builds, name):
    @examples
    @given(OPS[name].cases)
    def check(case):
        want = OPS[name].run(kernels, **case)
        for build_name, other in builds.items():
            got = OPS[name].run(other, **case)
            for key in want:
                assert got[key].tobytes() == want[key].tobytes(), (build_name, key)

    check()


@pytest.mark.parametrize("lanes", [1, 16])
def test_sanitizers_find_nothing_in_any_generated_call(tmp_path, lanes):
    flags = [
        "-g",
        "-O1",
        "-march=native",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    try:
        library = build(tmp_path, [*flags, f"-DMO_LANES={lanes}", "-Wno-psabi"])
    except subprocess.CalledProcessError:
        pytest.skip("gcc cannot build with the sanitizers")
    runtime = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "c.kernel_replay", str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
