"""What a run on an accelerator found: whether it can be trusted, tables of 80 columns, and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table

from experiments.benchmarks import tables
from experiments.benchmarks.race import Timing
from experiments.common import sections


def faults(result: sections.Result) -> list[str]:
    """What went wrong: checks that did not pass, rows that failed, and copies or verdicts that were not right."""
    found = [f"check of {check['name']}: {check['found']}" for check in result["checks"] if not check["passed"]]
    found += [] if result["rates"] else ["the device's rates could not be measured"]
    for row in result["rows"]:
        found += [f"{row['case']}, {row['name']}: {row['failed']}"] if "failed" in row else []
        for timing in row["timings"]:
            facts = timing["facts"]
            if any(facts.get("wrong_chips", ())) or not all(facts.get("right", ())):
                found.append(f"{_name(row, timing)}: wrong result")
    return found


def show(console: rich.console.Console, result: sections.Result) -> None:
    console.print(tables.machine_line(result))
    if not result["machine"]["accelerator"]:
        console.print("[bold]No accelerator: measured on CPU.[/bold]")
    elif result["devices"] == 1:
        console.print("One device: the training step has one party, whose gradient has no mask.")
    tables.show_load(console, result)
    table = _table("Checks against the host", ("check", "passed", "found"), left=("check", "found"))
    for check in result["checks"]:
        table.add_row(check["name"], _yes(check["passed"]), rich.markup.escape(check["found"]))
    console.print(table)
    rates = result["rates"]
    if rates:
        gigas = {name: _figure(rate / 1e9) for name, rate in rates.items()}
        console.print(
            f"copy {gigas['copy']} GB/s read and written, float32 matmul {gigas['matmul']} GFLOP/s "
            f"({gigas['exact matmul']} exact), ChaCha20 compiled {gigas['keystream']} GB/s, "
            f"OpenSSL on the host {gigas['openssl']} GB/s"
        )
    console.print(_timings(result["rows"]))
    for row in result["rows"]:
        if "left_out" in row:
            console.print(f"{row['case']}, {row['name']}: left out: {row['left_out']}")
    for fault in faults(result):
        console.print(f"[bold red]Wrong on this device:[/bold red] {rich.markup.escape(fault)}")


def _timings(rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    columns = ("what", "ms", "quartiles", "floor", "x floor", "compile s", "GB")
    table = _table("Medians of laps in milliseconds, without compilation; peak memory", columns, left=("what",))
    for row in rows:
        for timing in row["timings"]:
            floor, peak = timing["floor"], timing["device_peak_mb"] or timing["peak_mb"]
            table.add_row(
                _name(row, timing),
                _figure(1e3 * timing["median"]),
                "-".join(_figure(1e3 * value) for value in timing["quartiles"]),
                _figure(1e3 * floor) if floor else "-",
                f"{timing['median'] / floor:.1f}" if floor else "-",
                f"{timing['compile']:.1f}",
                f"{peak / 1e3:.1f}" if peak else "-",
            )
    return table


def _name(row: Mapping[str, Any], timing: Timing) -> str:
    arm = "bare files" if timing["side"] == "floor" else timing["arm"]
    return f"{arm}, {row['name']}"


def _figure(value: float) -> str:
    """Three digits or all whole ones, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 1e-9 else "0"


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column not in left)
    return table


def _yes(passed: bool) -> str:
    return "[green]yes[/green]" if passed else "[bold red]no[/bold red]"


def picture(path: Path, result: sections.Result) -> None:
    """Each median beside its floor, on a logarithmic axis; the title says how many checks passed."""
    pairs = [(_name(row, timing), timing) for row in result["rows"] for timing in row["timings"]]
    passed = sum(check["passed"] for check in result["checks"])
    with sections.figure(path, 9, 1.4 + 0.28 * max(1, len(pairs))) as fig:
        axes, places = fig.subplots(), np.arange(len(pairs))
        for place, (_, timing) in zip(places, pairs, strict=True):
            low, high = (1e3 * value for value in timing["quartiles"])
            if timing["floor"]:
                axes.plot([1e3 * timing["floor"], 1e3 * timing["median"]], [place, place], color="0.8", lw=4, zorder=1)
                axes.plot(1e3 * timing["floor"], place, "|", color="0.4", ms=9)
            axes.plot([low, high], [place, place], color="#c0392b", lw=1)
            axes.plot(1e3 * timing["median"], place, "o", color="#c0392b", ms=4)
        axes.set_xscale("log")
        axes.set_yticks(places, [name for name, _ in pairs], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds (bar: the device's floor)")
        checks = f"{passed} of {len(result['checks'])} checks passed"
        fig.suptitle(f"{tables.machine_line(result)}; {checks}", fontsize=7)
