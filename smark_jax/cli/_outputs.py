"""Checks that a command's output overwrites neither its input nor anything in a vault."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from smark_jax.vault.documents import Verdict


def check(
    option: str, out: Path, inputs: Iterable[Path | None] = (), vault: Path | None = None, *, folder: bool = False
) -> None:
    """Refuses an output that is an input, lies in the vault, or is a folder by mistake; call it before writing.

    Links and other spellings of a path count as the path itself.

    Args:
      option: the name of the argument or option.
      out: the file or folder to write.
      inputs: the files to read.
      vault: the vault's folder.
      folder: whether ``out`` is a folder to write into.

    Raises:
      typer.BadParameter: naming the output and what it would overwrite.
    """
    if not folder and out.is_dir():
        raise typer.BadParameter(f"'{out}' is a folder; name a file", param_hint=option)
    for read in inputs:
        if read is not None and _same(out, read):
            raise typer.BadParameter(f"{out} would overwrite {read}, which this command reads", param_hint=option)
    if vault is not None and out.resolve().is_relative_to(vault.resolve()):
        raise typer.BadParameter(f"{out} is inside the vault; name a place outside it", param_hint=option)


def suspects(verdict: "Verdict") -> list[Path]:
    """The files that a verdict is about, which no output may overwrite."""
    return [Path(suspect.file) for suspect in verdict.suspects if suspect.read != "answers"]


def _same(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    try:
        return one.samefile(other)  # hard links
    except OSError:
        return False
