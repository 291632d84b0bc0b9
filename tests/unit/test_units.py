import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum import units
from modicum.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("65536", 65536),
        (65536, 65536),
        ("256KB", 262144),
        ("256 kb", 262144),
        ("256K", 262144),
        ("256KiB", 262144),
        ("1MiB", 1048576),
        ("1 MB", 1048576),
        ("4GB", 4 * 1024**3),
        ("0.5 KiB", 512),
        ("640 B", 640),
        (" 1k ", 1024),
        ("0", 0),
    ],
)
def test_a_size_is_read_in_units_of_1024(text, expected):
    assert units.parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "KB", "-1", "1 2", "1TB", "0.3", "1e6", "0x10", "12 bytes", "1KBB", "nan", "٣KB", "1,5k"],
)
def test_what_is_not_a_size_is_a_usage_error_that_says_so(text):
    with pytest.raises(UsageError, match="is not a size") as caught:
        units.parse_size(text)
    assert caught.value.details["try"]


@given(st.integers(min_value=0, max_value=2**60))
def test_a_plain_number_of_bytes_is_read_back_exactly(n):
    assert units.parse_size(str(n)) == n


@given(st.integers(min_value=0, max_value=2**45).map(lambda n: 1024 * n))
def test_a_whole_number_of_kib_survives_printing_and_reading(n):
    assert units.parse_size(units.kib(n).replace(",", "")) == n


def test_kib_never_changes_unit_so_that_columns_compare():
    assert [units.kib(n) for n in (0, 100, 525312, 6190080)] == [
        "0.0 KiB",
        "0.1 KiB",
        "513.0 KiB",
        "6,045.0 KiB",
    ]


def test_size_takes_the_unit_that_reads_best():
    assert [units.size(n) for n in (0, 640, 1024, 262144, 2**20, 5 * 2**20 + 1, 2**34)] == [
        "0 B",
        "640 B",
        "1.0 KiB",
        "256.0 KiB",
        "1.0 MiB",
        "5,120.0 KiB",
        "16.0 GiB",
    ]


def test_counts_keep_about_three_digits():
    assert [units.count(n) for n in (0, 9999, 10_000, 999_949, 999_960, 22_480_000, 3.2e12)] == [
        "0",
        "9,999",
        "10.0 k",
        "999.9 k",
        "1.0 M",
        "22.5 M",
        "3.2 T",
    ]


def test_rates_shares_and_times_print_with_their_unit():
    assert units.rate(64_000_000) == "64 MHz"
    assert units.rate(1_500_000_000) == "1.5 GHz"
    assert units.percent(0.5) == "50.0 %"
    assert units.duration(0.0123) == "12.3 ms"
    assert units.duration(59.99) == "1 min 0 s"
    assert units.duration(3725) == "62 min 5 s"
