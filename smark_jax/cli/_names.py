"""Arguments and options of the commands that take customers' names, as they are or from a CSV file."""

from pathlib import Path
from typing import Annotated

import typer

from smark_jax.cli import _common

Customers = Annotated[list[str] | None, typer.Argument(help="Names; new ones are registered.", show_default=False)]
Csv = Annotated[
    Path | None,
    typer.Option(help="A CSV file with customers' names: commas, semicolons, tabs or bars between columns."),
]
Column = Annotated[
    str | None,
    typer.Option(metavar="NAME-or-NUMBER", help="The column of --csv that has the names, by heading or number."),
]
Heading = Annotated[
    bool | None,
    typer.Option("--heading/--no-heading", help="Whether the first line of --csv is a heading.", show_default=False),
]


def read(csv: Path | None, column: str | None, heading: bool | None) -> list[str]:
    """Reads the names in a CSV file and prints their number, first and last; without a file, an empty list."""
    if csv is None:
        if column is not None or heading is not None:
            raise typer.BadParameter("--column and --heading go with --csv", param_hint="--csv")
        return []
    from smark_jax.vault import names

    found = names.from_csv(csv, column, heading)
    _common.err.print(found.source, markup=False, highlight=False, soft_wrap=True)
    return found.names
