"""Commands run in this process as on a terminal or into a pipe, and a small terminal on which to look at the result."""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from smark_jax import cli
from smark_jax.cli import _common
from smark_jax.vault import crypto

# What Rich itself may write: colours; for spinners and bars also moves of the cursor and its visibility.
_OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|1A|2K)|\r(?=\x1b\[2K)")
_CODE = re.compile(r"(?:\x1b\[|\x9b)([0-9;?]*)([A-Za-z])|\x1b\].*?(?:\x07|\x1b\\)|\x1b.", re.DOTALL)


SECRET = "a sentence that nobody guesses"


class Ran(NamedTuple):
    """What a command wrote, and how it ended."""

    code: int
    out: str
    err: str


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _surroundings(patch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """What a console asks the environment, whatever it was when this process began."""
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        patch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        patch.setenv(name, value)
    for console in (_common.out, _common.err):
        patch.setattr(console, "_width", None)
        patch.setattr(console, "no_color", "NO_COLOR" in environment)


def run(*arguments: Any, folder: Path = Path(), terminal: bool = False, **environment: str) -> Ran:
    """Runs ``smark`` with these arguments; 80 columns where it is a terminal and nothing else is said."""
    out, err = (_Terminal(), _Terminal()) if terminal else (io.StringIO(), io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SMARK_PASSPHRASE", SECRET)
        _surroundings(patch, environment)
        patch.setattr(crypto, "_N", 2**10)  # a vault made here is opened quickly from here on
        patch.setattr(sys, "argv", ["smark", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main()
    return Ran(int(end.value.code or 0), out.getvalue(), err.getvalue())


def smark(folder: Path, *arguments: Any, code: int = 0) -> str:
    """What :func:`run` wrote in this folder; the command must end with this exit code."""
    ran = run(*arguments, folder=folder)
    assert ran.code == code, ran.out + ran.err
    return ran.out + ran.err


def shown(write: Callable[[], None], width: int | None = 80, *, tty: bool = True, **environment: str) -> str:
    """What a function writes to a terminal or pipe of that width; None: nobody says how wide it is."""
    out = _Terminal() if tty else io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        _surroundings(patch, environment)
        if width is not None:
            patch.setenv("COLUMNS", str(width))
        write()
    return out.getvalue()


def strange(written: str) -> list[str]:
    """The characters in it that are neither printable nor Rich's own codes."""
    return [char for char in _OWN.sub("", written) if char != "\n" and not (char.isprintable() or char == "\xa0")]


def screen(written: str, width: int = 80) -> list[str]:
    """The lines that a terminal shows: it wraps, and obeys the codes that move the cursor and erase."""
    cells: dict[tuple[int, int], str] = {}
    row = column = place = 0
    while place < len(written):
        code = _CODE.match(written, place)
        char = written[place]
        place = code.end() if code else place + 1
        if code and code[2]:
            numbers = [int(part) for part in re.findall(r"\d+", code[1])] or [0]
            step, kind = max(1, numbers[0]), code[2]
            row += {"A": -step, "F": -step, "B": step, "E": step}.get(kind, 0)
            column += {"C": step, "D": -step}.get(kind, 0)
            if kind in "HJ" and (kind == "H" or numbers[0] == 2):
                if kind == "J":
                    cells.clear()
                else:
                    row, column = numbers[0] - 1, numbers[1] - 1 if len(numbers) > 1 else 0
            if kind in "EF":
                column = 0
            if kind == "G":
                column = step - 1
            if kind == "K":
                gone = range(width) if numbers[0] == 2 else range(column, width) if numbers[0] == 0 else range(column)
                for x in gone:
                    cells.pop((row, x), None)
            row, column = max(0, row), min(max(0, column), width - 1)
        elif char == "\n":
            row, column = row + 1, 0
        elif char == "\r":
            column = 0
        elif char == "\b":
            column = max(0, column - 1)
        elif not code:
            if column == width:
                row, column = row + 1, 0
            cells[row, column] = char
            column += 1
    lines: list[list[str]] = [[] for _ in range(1 + max((r for r, _ in cells), default=0))]
    for (r, c), char in cells.items():
        lines[r] += [" "] * (c + 1 - len(lines[r]))
        lines[r][c] = char
    return ["".join(line).rstrip() for line in lines]
