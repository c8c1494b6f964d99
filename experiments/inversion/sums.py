"""The sum of several parties' gradients, one digit each, which masked aggregation reveals: what can be learnt from it?

The masks cancel exactly, so the plain sum is inverted. The attacker knows the parties' labels. Each original is
compared with its reconstruction under the best assignment, and with the mean training digit as the control.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import rich.console
import rich.table

from experiments.common import sections
from experiments.inversion import common
from smark_jax import attacks


@dataclasses.dataclass(frozen=True)
class Case:
    network: Literal["LeNet", "CNN"]
    method: attacks.InversionMethod
    parties: tuple[int, ...]
    steps: int
    trials: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    cases: tuple[Case, ...]


QUICK = Config((Case("LeNet", "dlg", (1, 2, 4, 8, 16, 32), 120), Case("CNN", "cosine", (1, 4), 120)))
FULL = Config(
    (
        Case("LeNet", "dlg", (1, 2, 4, 8, 16, 32), 400, trials=2),
        Case("CNN", "cosine", (1, 2, 4, 8, 16, 32), 400),
    )
)


def run(config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    meter.start(sum(case.steps * case.trials * sum(case.parties) for case in config.cases))
    images, labels, mean = common.digits()
    rows = []
    for case in config.cases:
        victim = common.victim(case.network, "fresh", seed)
        for parties in case.parties:
            scores, blind = [], []
            for trial in range(case.trials):
                theirs = slice(trial * max(case.parties), trial * max(case.parties) + parties)
                reconstruction = attacks.invert_gradient(
                    victim.apply_fn,
                    victim.params,
                    # The mean of the parties' gradients equals the gradient of the batch of all their images.
                    victim.gradient(images[theirs], labels[theirs]),
                    jax.random.fold_in(jax.random.key(seed), trial),
                    shape=(parties, *common.IMAGE_SHAPE),
                    labels=labels[theirs],
                    method=case.method,
                    steps=case.steps,
                    on_chunk=lambda done, case=case, parties=parties: meter.step(
                        f"{case.network}, {parties} parties", done * parties
                    ),
                )
                found = common.matched(np.asarray(reconstruction.images), images[theirs])
                scores += [common.likeness(*pair) for pair in zip(found, images[theirs], strict=True)]
                blind += [common.likeness(mean, image) for image in images[theirs]]
            rows.append(
                {
                    "network": case.network,
                    "method": case.method,
                    "steps": case.steps,
                    "parties": parties,
                    "trials": case.trials,
                    **common.summary(scores),
                    "control": common.summary(blind),
                }
            )
    return {"rows": rows}


def show(console: rich.console.Console, result: dict[str, Any]) -> None:
    title = "Digits from the sum of the parties' gradients (control: the mean digit)"
    table = rich.table.Table(title=title, title_justify="left")
    left = ("network", "method")
    columns = (
        "parties",
        "trials",
        "PSNR",
        "control",
        "best PSNR",
        "control",
        "SSIM",
        "control",
        "best SSIM",
        "control",
    )
    for column in (*left, *columns):
        table.add_column(column, justify="left" if column in left else "right")
    for row in result["rows"]:
        figures = []
        for name, places in (("psnr", 1), ("psnr_highest", 1), ("ssim", 2), ("ssim_highest", 2)):
            figures += [f"{row[name]:.{places}f}", f"{row['control'][name]:.{places}f}"]
        table.add_row(row["network"], row["method"], str(row["parties"]), str(row["trials"]), *figures)
    console.print(table)


def picture(path: Path, result: dict[str, Any]) -> None:
    colours = iter(("#c0392b", "#2c6fa8", "#d9a441"))
    with sections.figure(path, 6.5, 4.2) as fig:
        axes = fig.subplots()
        control: dict[int, float] = {}
        for name in dict.fromkeys((row["network"], row["method"]) for row in result["rows"]):
            rows = [row for row in result["rows"] if (row["network"], row["method"]) == name]
            parties, colour = [row["parties"] for row in rows], next(colours)
            axes.plot(parties, [row["psnr"] for row in rows], "o-", color=colour, label=f"{', '.join(name)}: mean")
            best = [row["psnr_highest"] for row in rows]
            axes.plot(parties, best, "^:", color=colour, ms=4, label=f"{', '.join(name)}: best digit")
            for row in rows:  # The case with the most trials determines the line.
                if row["trials"] >= max(r["trials"] for r in result["rows"] if r["parties"] == row["parties"]):
                    control[row["parties"]] = row["control"]["psnr"]
        points = sorted(control.items())
        axes.plot(*zip(*points, strict=True), color="0.2", ls="--", label="control: the mean digit")
        axes.set_xscale("log", base=2)
        axes.set_xticks([n for n, _ in points], [str(n) for n, _ in points])
        axes.set_xlabel("parties in the sum, one digit each")
        axes.set_ylabel("PSNR, dB")
        axes.set_title("What the sum of gradients still shows", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
