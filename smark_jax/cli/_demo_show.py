"""The output of ``smark demo``: progress bars, a table of verdicts, and a plot of the statistics."""

import functools
import math
import operator
import time
from pathlib import Path

import numpy as np

from smark_jax import _documents, _validate, tracing
from smark_jax.cli import _common, _console, _demo
from smark_jax.cli._console import Console, Styled


def run(config: _demo.Config, console: Console) -> _demo.Results:
    """Runs the demo, prints its table, writes ``results.json`` and ``statistics.png``, and returns the results."""
    began = time.perf_counter()
    with _validate.needs("demo", "demo"):
        import matplotlib  # noqa: F401 - checked now, since the plot comes only after minutes
    _common.before_training(config.parties)
    config.out.mkdir(parents=True, exist_ok=True)
    with _console.progress(console) as bars:
        suspects, verdicts, results = _demo.run(config, functools.partial(_console.bar, bars))
    picture(config.out / "statistics.png", suspects, verdicts)
    results = results._replace(seconds=round(time.perf_counter() - began, 1))
    (config.out / "results.json").write_bytes(_documents.pretty(results))
    table(console, config, results)
    return results


def table(console: Console, config: _demo.Config, results: _demo.Results) -> None:
    """Prints the verdicts on the weakest intact copy and on all other suspects, and a summary."""
    rows = results.suspects
    weakest = max(rows[: config.customers], key=operator.attrgetter("p_value"))
    shown = (weakest._replace(suspect=f"weakest copy, {weakest.customer}"), *rows[config.customers :])
    console.print()
    console.table(
        ("suspect", "accuracy", "|T|", "threshold", "p-value", "verdict"),
        [_row(row) for row in shown],
        keep=("verdict", "suspect", "p-value", "|T|", "accuracy", "threshold"),
        figures=("accuracy", "|T|", "threshold", "p-value"),
        title=f"Who leaked? {config.customers} customers, alpha = {_demo.ALPHA:g}",
    )
    console.print(
        f"Base accuracy {results.base_accuracy:.3f}; {config.customers} copies: mean "
        f"{results.marked_accuracy_mean:.4f}, worst {results.marked_accuracy_min:.3f}; "
        f"{results.bit_errors} of {config.customers * _demo.NUM_CHIPS:,} chips wrong; "
        f"{results.traced} of {config.customers} intact copies traced; "
        f"{results.innocents_accused} innocents accused."
    )
    console.say(f"Results: {config.out / 'results.json'}   Picture: {config.out / 'statistics.png'}")
    console.say(f"{results.seconds:.0f} seconds.")


def _row(row: _demo.Row) -> tuple[str | Styled, ...]:
    who = ", ".join(f"customer {serial}" for serial in row.accused) or "nobody"
    return (
        row.suspect,
        f"{row.accuracy:.3f}",
        f"{abs(row.statistic):.1f}",
        f"{row.threshold:.1f}",
        f"< 1e{math.floor(row.log10_p) + 1}" if row.log10_p < 0 else "-",
        (who, "green") if row.traced else (f"{who} (wrong)", "bold red"),
    )


def picture(path: Path, suspects: list[_demo.Suspect], verdicts: list[tracing.Verdict]) -> None:
    """Plots all customers' statistics for each leak, with the threshold, and intact copies against all codewords."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    strips, grid = figure.subplots(1, 2, width_ratios=(1.5, 1))
    shown = [pair for pair in zip(suspects, verdicts, strict=True) if not pair[0].name.startswith("copy")]
    jitter = np.random.default_rng(0).uniform(-0.14, 0.14, verdicts[0].num_customers)
    for height, (_, verdict) in enumerate(shown):
        accused = [a.serial for a in verdict.accused]
        rest = np.setdiff1d(np.arange(verdict.num_customers), accused)
        kwargs = {"label": "not accused"} if height == 0 else {}
        strips.scatter(verdict.statistics[rest], height + jitter[rest], s=22, c="0.55", linewidths=0, **kwargs)
        kwargs = {"label": "accused"} if height == 0 else {}
        strips.scatter(verdict.statistics[accused], [height] * len(accused), s=70, c="#c0392b", zorder=3, **kwargs)
        for serial in accused:
            strips.annotate(
                f"customer {serial}",
                (verdict.statistics[serial], height),
                xytext=(-8, 0),
                textcoords="offset points",
                ha="right",
                va="center",
            )
        for sign in (-1, 1):
            kwargs = {"label": "threshold"} if height == 0 and sign == 1 else {}
            strips.vlines(sign * verdict.threshold, height - 0.4, height + 0.4, colors="#2c3e50", lw=1.6, **kwargs)
    strips.set_yticks(range(len(shown)), [f"{suspect.name}\naccuracy {suspect.accuracy:.3f}" for suspect, _ in shown])
    strips.invert_yaxis()
    strips.margins(x=0.08)
    strips.set_xlabel("statistic T of each customer (innocents: mean 0, variance 1)")
    strips.set_title(f"Leaked models, traced among {verdicts[0].num_customers} customers", loc="left")
    strips.legend(loc="lower right", frameon=False, fontsize=8)
    intact = np.stack([v.statistics for s, v in zip(suspects, verdicts, strict=True) if s.name.startswith("copy")])
    limit = np.abs(intact).max()
    image = grid.imshow(intact, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    for axis in (grid.xaxis, grid.yaxis):
        axis.get_major_locator().set_params(integer=True)
    grid.set_xlabel("codeword of customer")
    grid.set_ylabel("intact copy of customer")
    grid.set_title("Intact copies against all codewords", loc="left")
    figure.colorbar(image, ax=grid, label="T", shrink=0.8)
    figure.savefig(path)
