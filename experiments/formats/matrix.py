"""Each network in its own form, one copy of it, and what other libraries make of the copy: T, and who is accused.

The owner's part is the desk's: a vault, a model without a network, a copy issued in the base's form, and suspects read
by content alone. The copy is one of a million that the model's code has words for; nobody is registered for the others.
"""

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments.common import sections
from experiments.formats.conversion import FORMS, running
from smark_jax import errors, files, statistics, tracing, vault
from smark_jax.vault import customers, issuing, models, reading, shapes

COPY = "the copy itself"
_SHORT = {"nobody": "not traced", "innocent": "INNOCENT", "absent": "-", "refused": "refused", "error": "ERROR"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Of each network the leaker's copy is judged among so many customers, at the desk's alpha of one in a million."""

    networks: tuple[str, ...] = running.NETWORKS
    customers: int = 10**6
    num_chips: int = 304
    alpha: float = 1e-6


QUICK = Config(("O-Net",), customers=10**4)
FULL = Config()


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(len(config.networks) * (1 + len(FORMS)))
    rows = [
        meter.part(network, 1 + len(FORMS), functools.partial(_row, network, config, seed, meter))
        for network in config.networks
    ]
    bar = statistics.threshold(np.ones(config.num_chips), math.log(config.alpha / config.customers))
    return {"networks": rows, "threshold": bar}


def _row(network: str, config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    """A network's cells."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            base = running.base(network, seed, folder)
        except running.Absent as error:
            cells = [{"form": form, "outcome": "absent", "reason": str(error)} for form in (COPY, *FORMS)]
            return {"network": network, "base": None, "cells": cells}
        vault.create(folder / "vault", "passphrase")
        with vault.opened(folder / "vault", "passphrase") as desk:
            leaves = files.read(base).leaves
            made = shapes.from_weights(leaves, models.choose(leaves))
            form = files.Form(base)
            model = models.add(
                desk, "network", leaves, num_chips=config.num_chips, alpha=config.alpha, made=made, form=form
            )
            *_, leaker = customers.resolve(desk, ["Ada", "Grace", "Mallory"])
            began = time.perf_counter()
            (copy,) = issuing.issue(model, [leaker], folder / "copies").files
            issued = time.perf_counter() - began
            meter.step(f"{network}: copy")
            suspects = {COPY: copy, **running.convert(network, copy, folder)}
            cells = _cells(model, leaker.serial, suspects, config, functools.partial(meter.step, network))
    weights = model.mark.spec.num_weights
    return {"network": network, "base": form.format, "carrying": weights, "issued": issued, "cells": cells}


def _cells(
    model: models.OpenModel, leaker: int, suspects: Mapping[str, Path | str], config: Config, step: Any
) -> list[dict[str, Any]]:
    """Reads the suspects as the desk does, and traces those that can be read, all on one occasion."""
    cells, chips, maps = [], [], []
    for form, path in suspects.items():
        cell: dict[str, Any] = {"form": form}
        cells.append(cell)
        if isinstance(path, str):
            cell |= {"outcome": "absent", "reason": path}
            continue
        began = time.perf_counter()
        try:
            found = reading.read(files.read(path, strict=False).leaves, model.base, model.mark, reading.Reading())
        except errors.SmarkError as error:
            cell |= {"outcome": "refused", "reason": " ".join(str(error).split())}
        except Exception as error:  # a defect, which must not hide the others
            cell |= {"outcome": "error", "reason": f"{type(error).__name__}: {error}"}
        else:
            read = found.coverage.read / found.coverage.weights
            cell |= {"outcome": "nobody", "read": read, "moves": len(found.layout)}
            chips.append(found.chips)
            maps.append(found.log_maps)
        cell["seconds"] = time.perf_counter() - began
        step()
    judged = [cell for cell in cells if cell["outcome"] == "nobody"]
    if judged:
        book = model.code.book(models.code_key(model.vault, model.name), config.customers, config.num_chips)
        verdicts = tracing.trace_batch(np.stack(chips), book, config.alpha, model.decoder, log_maps=maps)
        for cell, verdict in zip(judged, verdicts, strict=True):
            accused = {one.serial for one in verdict.accused}
            outcome = "innocent" if accused - {leaker} else "traced" if accused else "nobody"
            cell |= {"T": float(verdict.statistics[leaker]), "outcome": outcome}
    return cells


def show(console: rich.console.Console, result: sections.Result) -> None:
    rows = result["networks"]
    bases = [f"{row['network']}\n{row['base'] or ''}" for row in rows]
    title = f"T of the leaker, who alone is accused; from T {result['threshold']:.1f} on"
    table = rich.table.Table("suspect", *bases, title=title, title_justify="left")
    for cells in zip(*(row["cells"] for row in rows), strict=True):
        table.add_row(cells[0]["form"], *map(_words, cells))
    console.print(table)
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for cell in row["cells"]:
            if "reason" in cell:
                reasons.setdefault(cell["reason"], []).append(cell["form"])
        for reason, forms in reasons.items():
            what = "every form" if len(forms) == len(row["cells"]) else "; ".join(forms)
            console.print(f"{row['network']}, {what}: {reason}", markup=False, highlight=False)


def _words(cell: dict[str, Any]) -> str:
    """A cell of the table: T, with the share of weights read if it is not all; or what came of it instead."""
    if "T" not in cell:
        return _SHORT[cell["outcome"]]
    share = "" if cell["read"] > 0.999 else f" ({cell['read']:.0%} read)"
    return f"{cell['T']:.1f}{share}{'' if cell['outcome'] == 'traced' else ', ' + _SHORT[cell['outcome']]}"


def picture(path: Path, result: sections.Result) -> None:
    rows = result["networks"]
    forms = [cell["form"] for cell in rows[0]["cells"]]
    values = np.array([[cell.get("T", np.nan) for cell in row["cells"]] for row in rows]).T
    with sections.figure(path, 3 + 1.3 * len(rows), 1 + 0.3 * len(forms)) as figure:
        axes = figure.subplots()
        drawn = axes.imshow(values, "Blues", vmin=0, aspect="auto")
        for column, row in enumerate(rows):
            for line, cell in enumerate(row["cells"]):
                ink = "white" if cell.get("T", 0) > drawn.norm.vmax / 2 else "black"
                axes.text(column, line, _words(cell), ha="center", va="center", fontsize=7, color=ink)
        axes.set(xticks=range(len(rows)), xticklabels=[row["network"] for row in rows])
        axes.set(yticks=range(len(forms)), yticklabels=forms)
        axes.tick_params(labelsize=7)
        figure.colorbar(drawn, label="T of the leaker").ax.axhline(result["threshold"], color="k", lw=1)
