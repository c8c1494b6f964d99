"""Tables and pictures that both sections share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments.benchmarks.race import Timing
from experiments.common import sections


def show_machine(console: rich.console.Console, result: sections.Result) -> None:
    found, rates = result["machine"], result["rates"]
    console.print(machine_line(result))
    if not found["torch"]:
        console.print("PyTorch is not installed (extra 'bench'): smark_jax ran alone.")
    show_load(console, result)
    console.print(
        f"copy {rates['copy'] / 1e9:.1f} GB/s read and written, float32 matmul {rates['matmul'] / 1e9:.0f} GFLOP/s, "
        f"ChaCha20 {rates['keystream'] / 1e9:.2f} GB/s"
    )


def show_load(console: rich.console.Console, result: sections.Result) -> None:
    """A warning where other programs had the cores."""
    found = result["machine"]
    if found["load_average"] > 1.5 * found["threads"]:
        load = f"load {found['load_average']:.1f}"
        console.print(f"[bold]The machine was busy[/bold] ({load}): measure again on a quiet one.")


def machine_line(result: sections.Result) -> str:
    found = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    device = "" if found["device"] == "cpu" else f"{found['device']}, "
    return f"{device}{found['cpu']}, {found['threads']} threads, {versions}, seed {found['seed']}"


def show_timings(console: rich.console.Console, timings: Sequence[Timing]) -> None:
    table = rich.table.Table(
        title="Medians and quartiles of laps in milliseconds, memory in megabytes", title_justify="left"
    )
    for column in (
        "side",
        "case",
        "median",
        "quartiles",
        "laps",
        "floor",
        "x floor",
        "first lap",
        "imports",
        "peak",
        "found",
    ):
        table.add_column(column, justify="left" if column in ("side", "case", "found") else "right")
    for row in timings:
        floor, peak = row["floor"], row["device_peak_mb"] or row["peak_mb"]
        found = {name: float(np.mean(values)) for name, values in row["facts"].items() if name != "amount"}
        table.add_row(
            row["side"],
            label(row),
            f"{1e3 * row['median']:.2f}",
            " to ".join(f"{1e3 * value:.2f}" for value in row["quartiles"]),
            f"{len(row['laps'])}",
            f"{1e3 * floor:.2f}" if floor else "-",
            f"{row['median'] / floor:.1f}" if floor else "-",
            f"{1e3 * row['first_lap']:.0f}",
            f"{row['imported_mb']:.0f}" if row["imported_mb"] else "-",
            f"{peak:.0f}" if peak else "-",
            ", ".join(f"{name} {value:.4g}" for name, value in found.items()),
        )
    console.print(table)


def label(row: Timing) -> str:
    """A timing's case in words."""
    names = {"num_weights": "D", "num_chips": "m", "num_customers": "N", "num_copies": "K", "parties": "P"}
    params = row["params"]
    parts = [params[name] for name in ("name", "dtype", "decoder") if name in params]
    parts += [f"{short} = {params[name]:,}" for name, short in names.items() if params.get(name)]
    return f"{row['case']}: {row['arm']}" + (f" ({', '.join(parts)})" if parts else "")


def plain_ticks(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """On a logarithmic axis: these ticks only, as plain numbers; without any, the powers of ten."""
    from matplotlib import ticker

    if ticks is not None:
        axis.set_major_locator(ticker.FixedLocator(list(ticks)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
