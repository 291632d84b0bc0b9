"""Board: where a model has to train, and the catalogue of boards that modicum knows.

Figures come from `boards.toml` beside this file, each with its source. A board of your
own is a file with one such table: `Board.from_toml("my_board.toml")`.
"""

from __future__ import annotations

import difflib
import functools
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from modicum.errors import InvalidInput, UsageError
from modicum.units import parse_size, rate, size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Board", "boards", "get"]


def _to_bytes(value: object) -> object:
    """Read "256 KB" as 262144; leave everything else to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError as error:
        raise ValueError(str(error.what)) from None


_Size = Annotated[PositiveInt, BeforeValidator(_to_bytes)]
_SizeOrZero = Annotated[NonNegativeInt, BeforeValidator(_to_bytes)]


class Board(BaseModel):
    """One board: its memories, its clock, how to compile for it, and where each figure is from.

    Sizes are bytes; a TOML file may also write them as "256 KB" (of 1024 bytes).

    >>> board = get("nano33ble")
    >>> board.ram, board.reserve, board.available
    (262144, 24576, 237568)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str
    chip: str
    core: str
    """The kind of core, for example cortex-m4f."""
    kind: Literal["mcu", "linux"]
    cpu_flags: tuple[str, ...] = ()
    """For arm-none-eabi-gcc; empty where another compiler builds."""
    ram: _Size
    """The largest single contiguous region that one static arena can take."""
    ram_total: _Size
    """All data RAM of the board, whether contiguous or not."""
    flash: _Size
    """Where code and frozen weights lie."""
    clock_hz: PositiveInt
    reserve: _SizeOrZero
    """Bytes of `ram` left to the application: drivers, radio, an RTOS; on Linux, the system."""
    qemu: str | None = None
    """QEMU machine with the same core, None if there is none to run on."""
    active_power_w: PositiveFloat | None = None
    """Power while computing."""
    radio_j_per_byte: PositiveFloat | None = None
    """Energy to send one byte."""
    sources: dict[str, str] = Field(default_factory=dict)
    """For each figure, the document that it is from."""

    @property
    def available(self) -> int:
        """Bytes that modicum may use in all: arena, .data, .bss and stack."""
        return self.ram - self.reserve

    @classmethod
    def from_toml(cls, path: str | Path) -> Board:
        """Read a board of your own: a file with one table, as in `boards.toml`.

        Raises InvalidInput where the file cannot be read or is not one board.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"cannot read the board file {path}.",
                why=str(error),
                hint="the path of a TOML file",
            ) from None
        found = _parse(text, where=str(path))
        if len(found) != 1:
            raise InvalidInput(
                f"a board file holds one board, {path} holds {len(found)}.",
                where=str(path),
                hint="one table, for example [my_board], with its figures",
            )
        return next(iter(found.values()))

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Board:
        if self.ram > self.ram_total:
            raise ValueError(
                f"ram ({size(self.ram)}) is more than ram_total ({size(self.ram_total)})"
            )
        if self.reserve >= self.ram:
            raise ValueError(f"reserve ({size(self.reserve)}) leaves nothing of {size(self.ram)}")
        if strays := set(self.sources) - set(type(self).model_fields):
            raise ValueError(f"sources name no figure of a board: {', '.join(sorted(strays))}")
        return self

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.title} ({self.chip}, {self.core} at {rate(self.clock_hz)}), "
            f"RAM {size(self.ram)} less {size(self.reserve)}, flash {size(self.flash)}"
        )


def boards() -> dict[str, Board]:
    """Return the catalogue, by name, in the order of `boards.toml`."""
    return dict(_catalogue())


def get(name: str) -> Board:
    """Return the board called `name`.

    Raises UsageError, with the names that come close, where there is none.

    >>> get("stm32h743").core
    'cortex-m7'
    """
    known = _catalogue()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    raise UsageError(
        f"no board is called {name!r}.",
        close=", ".join(close) or None,
        known=", ".join(known),
        hint="one of these, or Board.from_toml(path) for a board of your own",
    )


@functools.cache
def _catalogue() -> dict[str, Board]:
    text = resources.files("modicum").joinpath("boards.toml").read_text(encoding="utf-8")
    return _parse(text, where="boards.toml")


def _parse(text: str, where: str) -> dict[str, Board]:
    """Read tables of boards; the table's name is the board's."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput("the board file is not TOML.", where=where, why=str(error)) from None
    found = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InvalidInput(
                f"{name!r} stands outside a table.",
                where=where,
                why="each board is a table, and the table's name is the board's",
                hint=f"a line [my_board] above {name}",
            )
        try:
            found[name] = Board.model_validate({"name": name, **table})
        except ValidationError as error:
            raise InvalidInput(
                f"board {name!r} is not complete or not right.",
                where=where,
                why=[
                    f"{'.'.join(map(str, e['loc'])) or name}: {e['msg']}"
                    for e in error.errors(include_url=False)
                ],
            ) from None
    return found
