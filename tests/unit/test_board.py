import pytest
from pydantic import ValidationError

from modicum import board
from modicum.board import Board
from modicum.errors import InvalidInput, UsageError

FIGURES = (
    "ram",
    "ram_total",
    "flash",
    "clock_hz",
    "reserve",
    "active_power_w",
    "radio_j_per_byte",
)

MINE = """
[mine]
title = "My board"
chip = "XYZ"
core = "cortex-m4f"
kind = "mcu"
cpu_flags = ["-mcpu=cortex-m4"]
ram = "64 KB"
ram_total = 131072
flash = "512 KB"
clock_hz = 80_000_000
reserve = "4 KB"
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_catalogue_has_the_boards_that_the_documents_name():
    assert list(board.boards()) == [
        "nano33ble",
        "stm32f746",
        "stm32h743",
        "stm32n657",
        "corstone300",
        "rp2350",
        "esp32s3",
        "pizero2w",
        "pi4",
        "host",
    ]


@pytest.mark.parametrize("one", board.boards().values(), ids=lambda b: b.name)
def test_every_figure_of_the_catalogue_has_its_source_and_no_source_is_left_over(one):
    stated = {figure for figure in FIGURES if getattr(one, figure) is not None}
    assert set(one.sources) == stated
    assert all(len(text) > 10 for text in one.sources.values())


@pytest.mark.parametrize("one", board.boards().values(), ids=lambda b: b.name)
def test_flags_and_machine_go_with_the_core(one):
    machines = {
        "cortex-m4f": "mps2-an386",
        "cortex-m7": "mps2-an500",
        "cortex-m55": "mps3-an547",
    }
    assert one.qemu == machines.get(one.core)
    assert bool(one.cpu_flags) == one.core.startswith("cortex-m")
    assert one.core.startswith("cortex-m") <= (one.kind == "mcu")
    if one.cpu_flags:
        assert one.cpu_flags[0] == "-mcpu=" + one.core.removesuffix("f")


def test_the_largest_single_region_is_what_counts_as_ram():
    h743 = board.get("stm32h743")
    assert (h743.ram, h743.ram_total) == (512 * 1024, 1024 * 1024)
    nano = board.get("nano33ble")
    assert (nano.ram, nano.available) == (256 * 1024, 232 * 1024)


def test_an_unknown_name_lists_the_close_ones_and_all():
    with pytest.raises(UsageError, match="no board is called 'stm32h7'") as caught:
        board.get("stm32h7")
    assert "stm32h743" in caught.value.details["close"][0]
    assert "nano33ble" in caught.value.details["known"][0]
    with pytest.raises(UsageError) as caught:
        board.get("zzzzzz")
    assert "close" not in caught.value.details


def test_the_returned_catalogue_is_a_copy():
    board.boards().clear()
    assert board.get("pi4").kind == "linux"


def test_a_board_does_not_change():
    with pytest.raises(ValidationError):
        board.get("pi4").ram = 1


def test_a_board_of_ones_own_comes_from_one_table(tmp_path):
    mine = Board.from_toml(write(tmp_path, MINE))
    assert mine.name == "mine"
    assert (mine.ram, mine.ram_total, mine.available) == (65536, 131072, 61440)
    assert mine.qemu is None
    assert "80 MHz" in str(mine)


def test_a_board_goes_through_json_unchanged():
    for one in board.boards().values():
        assert Board.model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINE.replace('"64 KB"', '"64 pounds"'), "ram"),
        (MINE.replace('"64 KB"', "-1"), "ram"),
        (MINE.replace('"64 KB"', '"256 KB"'), "more than ram_total"),
        (MINE.replace('"4 KB"', '"64 KB"'), "leaves nothing"),
        (MINE.replace('"mcu"', '"toaster"'), "kind"),
        (MINE.replace("clock_hz", "clock"), "clock_hz"),
        (MINE + "colour = 'red'\n", "colour"),
        (MINE + "[mine.sources]\ncolour = 'the box'\n", "colour"),
        (MINE.replace("[mine]", "[My Board]"), "not TOML"),
        (MINE.replace("[mine]", '["My Board"]'), "name"),
        ("", "holds 0"),
        (MINE + MINE.replace("mine", "yours"), "holds 2"),
        ("ram = 4", "outside a table"),
        ("[mine", "not TOML"),
    ],
)
def test_a_broken_board_file_says_what_is_wrong_and_where(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        Board.from_toml(path)
    assert says in caught.value.render()
    assert str(path) in caught.value.render()


def test_a_board_file_that_cannot_be_read_says_so(tmp_path):
    with pytest.raises(InvalidInput, match="cannot read"):
        Board.from_toml(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot read"):
        Board.from_toml(tmp_path / "bytes.toml")
