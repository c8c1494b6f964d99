"""Tables that a section prints and tables.md repeats, with the same rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import rich.console
import rich.markup
import rich.table

from experiments.common import sections


class Table(NamedTuple):
    """Text in rows; the first ``left`` columns are names, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int = 1


def show(console: rich.console.Console, tables: Sequence[Table]) -> None:
    for table in tables:
        shown = rich.table.Table(title=rich.markup.escape(table.title), title_justify="left")
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if number < table.left else "right")
        for row in table.rows:
            shown.add_row(*map(rich.markup.escape, row))
        console.print(shown)


def markdown(table: Table) -> str:
    rule = tuple("---" if number < table.left else "---:" for number in range(len(table.columns)))
    head, *body = (tuple(cell.replace("|", r"\|") for cell in row) for row in (table.columns, *table.rows))
    return f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def command(package: str, document: Mapping[str, Any]) -> str:
    """The command that made a result."""
    words = [f"python -m experiments.{package} --only {document['section']}"]
    words += [f"--config {document['config']}"] if document["config"] != "quick" else []
    words += [f"--seed {document['seed']}"] if document["seed"] else []
    dataset = document["parameters"].get("data", "mnist_5k")
    return " ".join(words + ([f"--data {dataset}"] if dataset != "mnist_5k" else []))


def write(out: Path, modules: Mapping[str, ModuleType]) -> Path:
    """Writes ``tables.md`` from all results in the folder, and returns its path."""
    parts = ["# Tables", "Made by `python -m experiments.paper` from the results beside this file; not edited by hand."]
    for name, module in modules.items():
        path = out / f"{name}.json"
        if path.exists():
            document = sections.kept(path)
            parts.append(f"## {name}")
            parts.append(
                f"`{command('paper', document)}`; seed {document['seed']}; commit {document['commit'] or 'unknown'}; "
                f"device {document['device']}; {document['seconds']:,.0f} s"
                f"{' since it was resumed' if document['resumed'] else ''}."
            )
            parts += [markdown(table) for table in module.tables(document["result"])]
    path = out / "tables.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path
