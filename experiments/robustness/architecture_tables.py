"""What the section ``architectures`` found, as tables of 80 columns and as a picture."""

from pathlib import Path

import numpy as np
import rich.box
import rich.console
import rich.table

from experiments.common import sections
from experiments.common.networks import ALPHA


def show(console: rich.console.Console, result: sections.Result) -> None:
    _rewrites(console, result)
    _damages(console, result)
    _innocents(console, result)
    _other_forms(console, result)
    for row in result["networks"]:
        for what in ("unfollowed", "beyond"):
            if row[what]:
                console.print(f"{row['network']}, {what}: {', '.join(row[what])}", markup=False)
        for kind in ("rewrites", "damaged", "forms"):
            refused = [one for one in row[kind] if one["answer"] != "copy"]
            for answer in dict.fromkeys(one["answer"] for one in refused):
                reasons = [one["reason"] for one in refused if one["answer"] == answer]
                heading = f"{row['network']}, {kind}: {answer} for {len(reasons)} of {len(row[kind])}"
                console.print(f"{heading}, the first: {reasons[0]}", markup=False)


def _table(*columns: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _print(console: rich.console.Console, title: str, table: rich.table.Table) -> None:
    """The title may be wider than the table."""
    console.print(f"[italic]{title}[/italic]")
    console.print(table)
    console.print()


def _rewrites(console: rich.console.Console, result: sections.Result) -> None:
    table = _table(
        *("network", "accuracy\n(copy)", "logits'\nchange", "simi-\nlarity", "traced\n(T)", "raw\n(|T|)"),
        *("wrong", "s"),
    )
    for row in result["networks"]:
        found, raw = row["rewrites"], [one["unaligned"] for one in row["rewrites"]]
        statistics = [f"{bound(one['T'] for one in found):.1f}" for bound in (min, max)]
        table.add_row(
            row["network"],
            f"{row['accuracy']:.3f}\n({row['accuracy_of_copy']:.3f})",
            f"{max(one['logits'] for one in found):.0e}",
            f"{min(one['similarity'] for one in found):.3f}",
            f"{_traced(found)}\n({'-'.join(dict.fromkeys(statistics))})",
            f"{_traced(raw)}\n({max(abs(one['T']) for one in raw):.1f})",
            str(sum(one["wrong"] for one in (*found, *raw))),
            f"{np.median([one['seconds'] for one in found]):.1f}",
        )
    title = (
        f"Random members of all rewrites; {result['customers']:,} customers, alpha {ALPHA:g}: "
        f"accused from T = {result['threshold']:.1f}; raw: without alignment"
    )
    _print(console, title, table)


def _traced(rows: list[dict]) -> str:
    return f"{sum(one['traced'] for one in rows)}/{len(rows)}"


def _damages(console: rich.console.Console, result: sections.Result) -> None:
    names = list(dict.fromkeys(one["damage"] for row in result["networks"] for one in row["damaged"]))
    table = _table("network", *names)
    for row in result["networks"]:
        cells = []
        for name in names:
            some = [one for one in row["damaged"] if one["damage"] == name]
            statistics = (f"{one['T']:.1f}{'' if one['traced'] else '*'}" for one in some)
            accuracies = (f"{one['accuracy']:.2f}" for one in some)
            cells.append(f"{' / '.join(statistics)}\n({' / '.join(accuracies)})")
        table.add_row(row["network"], *cells)
    _print(console, "T after damage and a rewrite / a rewrite and damage (accuracy); * not traced", table)


def _innocents(console: rich.console.Console, result: sections.Result) -> None:
    table = _table(
        *("network", "copies:\nmean", "worst\nmean", "most\n|T|", "independ-\nents are"),
        *("simi-\nlar", "worst\nmean", "most\n|T|", "accu-\nsed"),
    )
    for row in result["networks"]:
        found, others = row["rewrites"], row["independents"]
        means = [one["innocent_mean"] for one in found]
        table.add_row(
            row["network"],
            f"{np.mean(means):+.3f}",
            f"{max(means, key=abs):+.3f}",
            f"{max(one['innocent_largest'] for one in found):.1f}",
            "\n".join(dict.fromkeys(one["answer"] for one in others)),
            f"{max(one['similarity'] for one in others):.3f}",
            f"{max((one['innocent_mean'] for one in others), key=abs):+.3f}",
            f"{max(one['innocent_largest'] for one in others):.1f}",
            str(sum(one["accused"] for one in others)),
        )
    number = result["innocents"]
    title = f"T of {number:,} innocents after alignment; the standard error of a mean is {number**-0.5:.3f}"
    _print(console, title, table)


def _other_forms(console: rich.console.Console, result: sections.Result) -> None:
    names = [one["form"] for one in result["networks"][0]["forms"]]
    table = _table("network", *(name.replace(" ", "\n") for name in names), "most\ns")
    for row in result["networks"]:
        answers = ["traced" if one["traced"] else one["answer"] for one in row["forms"]]
        table.add_row(row["network"], *answers, f"{max(one['seconds'] for one in row['forms']):.1f}")
    _print(console, "Rewritten copies in other forms: what alignment answers", table)


def picture(path: Path, result: sections.Result) -> None:
    rows = result["networks"]
    with sections.figure(path, 3.5 + 0.55 * len(rows), 4) as figure:
        axes = figure.subplots()
        for at, row in enumerate(rows):
            series = {
                "rewritten, unaligned": ("tab:gray", ".", [one["unaligned"]["T"] for one in row["rewrites"]]),
                "rewritten, aligned": ("tab:blue", ".", [one["T"] for one in row["rewrites"]]),
                "damaged too, aligned": ("tab:orange", "x", [one["T"] for one in row["damaged"]]),
            }
            for number, (label, (color, marker, values)) in enumerate(series.items()):
                places = at + 0.27 * (number - 1) + np.linspace(-0.1, 0.1, len(values))
                axes.plot(places, values, marker, color=color, ms=4, label=None if at else label)
        axes.axhline(
            result["threshold"], color="tab:red", lw=1, label=f"accused above, {result['customers']:,} customers"
        )
        axes.set_xticks(range(len(rows)), [row["network"] for row in rows], rotation=40, ha="right")
        axes.set_ylabel("statistic T of the leaker")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
