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


@pytest.mark.parametrize("lanes", [1, 4])
def test_sanitizers_find_nothing_in_any_generated_call(tmp_path, lanes):
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    try:
        library = build(tmp_path, [*flags, f"-DMO_LANES={lanes}"])
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


DIGEST = Path(__file__).with_name("digest.c")
BOARDS = {
    "m4f": ("mps2-an386", "-mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -O2", 0x20000000),
    "m7": ("mps2-an500", "-mcpu=cortex-m7 -mfpu=fpv5-sp-d16 -Os", 0x20000000),
    "m55": ("mps3-an547", "-mcpu=cortex-m55 -O2", 0x21000000),
}


@pytest.fixture(scope="module")
def host_digest(tmp_path_factory) -> str:
    program = tmp_path_factory.mktemp("digest") / "digest"
    files = [DIGEST, DIGEST.with_name("digest_host.c"), *SOURCES]
    flags = [*PARITY, *WARNINGS, "-DMO_LANES=4", f"-I{SOURCE_DIR}"]
    subprocess.run(["gcc", *flags, *map(str, files), "-o", str(program)], check=True)
    return subprocess.check_output([str(program)], text=True)


@pytest.mark.qemu
@pytest.mark.parametrize("board", BOARDS)
def test_emulated_board_agrees_with_the_host_to_the_bit(tmp_path, host_digest, board):
    machine, target, ram = BOARDS[board]
    files = [DIGEST, DIGEST.with_name("digest_board.c"), *SOURCES]
    flags = [*PARITY, *WARNINGS, *target.split(), "-mthumb", "-mfloat-abi=hard", f"-I{SOURCE_DIR}"]
    link = ["-nostartfiles", "--specs=nano.specs", f"-Wl,--defsym=ram_origin={ram}"]
    link += ["-T", str(DIGEST.with_name("digest_board.ld")), "-o", "digest.elf"]
    command = ["arm-none-eabi-gcc", *flags, *map(str, files), *link]
    subprocess.run(command, check=True, cwd=tmp_path)
    emulator = ["qemu-system-arm", "-M", machine, "-display", "none", "-monitor", "none"]
    emulator += ["-serial", "none", "-semihosting-config", "enable=on,target=native"]
    # semihosting prints to stderr
    done = subprocess.run(
        [*emulator, "-kernel", "digest.elf"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stderr == host_digest
