"""Errors that say what, where, why, and what to try.

A user's mistake is a subclass of `ModicumError` with its own exit code; a broken
invariant of our own is a `Bug`. The command line prints `render()` and exits with
`exit_code`; with ``--json`` it prints `as_dict()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "Bug",
    "DoesNotFit",
    "InvalidInput",
    "ModicumError",
    "ParityError",
    "ToolMissing",
    "UnsupportedOperator",
    "UsageError",
]


class ModicumError(Exception):
    """Something failed; every error of modicum is one of these.

    `what` is one sentence. The details are labelled lines below it, in the order given;
    the usual labels are `where`, `why` and `hint`, which prints as ``try`` (a Python
    keyword). A detail that is None is left out, a list takes one line per item.

    >>> print(DoesNotFit("bias needs 513 KiB.", floor="504 KiB", hint="a smaller input").render())
    DoesNotFit: bias needs 513 KiB.
      floor  504 KiB
      try    a smaller input
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, **details: str | Sequence[str] | None) -> None:
        super().__init__(what)
        self.what = what
        self.details: dict[str, list[str]] = {}
        for label, value in details.items():
            if value is None:
                continue
            text = [value] if isinstance(value, str) else [str(item) for item in value]
            lines = [line for item in text for line in item.splitlines()]
            if lines:
                self.details["try" if label == "hint" else label] = lines

    def __str__(self) -> str:
        width = max(5, *(len(label) for label in self.details), 0)
        out = [self.what]
        for label, lines in self.details.items():
            for i, line in enumerate(lines):
                out.append(f"  {label if i == 0 else '':<{width}}  {line}")
        return "\n".join(out)

    def render(self) -> str:
        """Return the text for a terminal, beginning with the name of the error."""
        return f"{type(self).__name__}: {self}"

    def as_dict(self) -> dict[str, object]:
        """Return the error as plain data, for ``--json``."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": self.what,
            **{label: "\n".join(lines) for label, lines in self.details.items()},
        }

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.details))


class UsageError(ModicumError):
    """The call itself is wrong: an unknown board, a flag that does not go with another."""

    exit_code = 2


class DoesNotFit(ModicumError):
    """No placement within the limits; the details name the floor and the nearest that fits."""

    exit_code = 3


class UnsupportedOperator(ModicumError):
    """The model has operators that modicum does not know; all are listed at once."""

    exit_code = 4


class ParityError(ModicumError):
    """Two runs that must agree do not; the details name the first step and tensor."""

    exit_code = 5


class InvalidInput(ModicumError):
    """A file or a value from outside is broken: plan, weights, state blob, data."""


class Diverged(InvalidInput):
    """The loss, or what was to be learned by it, became infinite or no number."""


class ToolMissing(ModicumError):
    """A program that the work needs is not on this machine: a compiler, QEMU."""


class Bug(ModicumError):
    """An invariant of modicum itself is broken; please report it."""

    exit_code = 70

    def __init__(self, what: str, **details: str | Sequence[str] | None) -> None:
        details.setdefault(
            "hint", "please report this, with the command and the model or plan that caused it"
        )
        super().__init__(what, **details)


def _rebuild(kind: type[ModicumError], what: str, details: dict[str, list[str]]) -> ModicumError:
    """Unpickle: worker processes hand errors back through here."""
    error = kind(what)
    error.details = details
    return error
