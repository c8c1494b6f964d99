"""How many probes a query needs: the number that the desk asks, and how many suspects its decoder then traces."""

import dataclasses
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from experiments.common import sections
from smark_jax import codes, tracing
from smark_jax.vault import shown

_ALPHA = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings.

    Attributes:
      agreements: shares of the probes that a suspect answers as its copy was taught.
      customers: who might be accused; the first number is the one traced among.
      copies: suspects for each agreement.
    """

    agreements: tuple[float, ...]
    customers: tuple[int, ...]
    copies: int


QUICK = Config((0.9,), (200,), 40)
FULL = Config((0.97, 0.9, 0.85, 0.8, 0.75), (1_000, 1_000_000), 200)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    """For each agreement the numbers of probes, and how many suspects the decoder traces, and how many innocents."""
    meter.start(len(config.agreements))
    rng, number = np.random.default_rng(seed), config.customers[0]
    rows = []
    for agreement in config.agreements:
        needed = [shown.needed(customers, _ALPHA, agreement) for customers in config.customers]
        words = np.asarray(codes.codebook(sections.secret(seed, "words"), range(number), needed[0]), np.float64)
        right = np.where(rng.random((config.copies, needed[0])) < agreement, 1, -1)
        # A batch divides its level among all its suspects, so each is tested at alpha.
        found = tracing.trace_batch(right * words[: config.copies], words.astype(np.int8), _ALPHA * config.copies)
        accused = [[a.serial for a in verdict.accused] for verdict in found]
        rows.append(
            {
                "agreement": agreement,
                "needed": needed,
                "traced": sum(place in some for place, some in enumerate(accused)),
                "innocents": sum(serial != place for place, some in enumerate(accused) for serial in some),
            }
        )
        meter.step(f"{agreement:.0%}")
    return {"customers": list(config.customers), "copies": config.copies, "rows": rows}


def show(console: rich.console.Console, result: sections.Result) -> None:
    """The table of docs/blackbox.md."""
    columns = [f"N = {customers:,}" for customers in result["customers"]]
    table = rich.table.Table("answered as taught", *columns, "traced", "innocents accused", title="Probes that suffice")
    for row in result["rows"]:
        traced = f"{row['traced']} of {result['copies']}"
        table.add_row(f"{row['agreement']:.0%}", *map(str, row["needed"]), traced, str(row["innocents"]))
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    """Probes that suffice, by agreement."""
    with sections.figure(path, 5, 3) as figure:
        axes = figure.subplots()
        for place, customers in enumerate(result["customers"]):
            pairs = [(row["agreement"], row["needed"][place]) for row in result["rows"]]
            axes.plot(*zip(*pairs, strict=True), "o-", label=f"{customers:,} customers")
        axes.set(xlabel="share answered as taught", ylabel="probes that suffice")
        axes.legend(frameon=False)
