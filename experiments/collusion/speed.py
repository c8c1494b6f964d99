"""Time and peak memory from key to corrected p-values, with a separate process for each case.

    python -m experiments.collusion.speed 1000000 single 3

prints one case as JSON: customers, decoder, colluders.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import rich.console
import rich.table

from experiments.collusion import common
from experiments.common import sections
from smark_jax import codes, tracing

Decoder = Literal["joint", "sequential", "single"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement and its targets (None: none stated)."""

    customers: int
    decoder: str
    colluders: int
    seconds: float | None = None
    megabytes: float | None = None
    keep: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    cases: tuple[Case, ...]
    num_chips: int = 304


QUICK = Config(
    (
        Case(10**6, "single", 3, 0.4, 500),
        Case(10**6, "joint", 10, 5),
        Case(10**7, "single", 3, 4, 500, keep=False),
    )
)
FULL = Config((*QUICK.cases, Case(10**7, "single", 3, 4), Case(10**8, "single", 3, None, 500, keep=False)))


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(len(config.cases))
    rows = []
    for case in config.cases:
        meter.step(f"{case.decoder}, N = {case.customers:,}", 0)
        command = [sys.executable, "-m", "experiments.collusion.speed", str(case.customers), case.decoder]
        command += [str(case.colluders), str(config.num_chips), str(seed), str(int(case.keep))]
        root = Path(__file__).parents[2]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": path})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        rows.append({**dataclasses.asdict(case), "measured": json.loads(done.stdout.splitlines()[-1])})
        meter.step()
    return {"rows": rows}


def measure(customers: int, decoder: Decoder, colluders: int, m: int, seed: int, keep: bool) -> sections.Result:
    key = common.master_key(seed, "speed")
    rng = np.random.default_rng(seed)
    serials = rng.choice(customers, colluders, replace=False)
    y = np.asarray(codes.codebook(key, serials, m), np.float64).mean(axis=0) + 0.1 * rng.normal(size=m)
    before = _peak_megabytes()
    seconds = []
    guilty = innocent = 0
    for _ in range(1 if customers >= 10**8 else 3):
        began = time.perf_counter()
        verdict = tracing.trace(y, codes.Codebook(key, customers, m), 1e-6, decoder, keep_statistics=keep)
        seconds.append(time.perf_counter() - began)
        guilty, innocent = common.caught(verdict, set(serials.tolist()))
    return {
        "cold_seconds": round(seconds[0], 3),
        "warm_seconds": round(min(seconds[1:]), 3) if seconds[1:] else None,
        "peak_megabytes": round(_peak_megabytes()),
        "megabytes_before": round(before),
        "caught": guilty,
        "innocents": innocent,
        "load_average": os.getloadavg()[0],
    }


def _peak_megabytes() -> float:
    """VmHWM of this process; ru_maxrss would begin at the size of whatever process started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def show(console: rich.console.Console, result: sections.Result) -> None:
    table = rich.table.Table(title="From key to corrected p-values", title_justify="left")
    for column in ("decoder", "N", "kept", "caught", "cold [s]", "warm [s]", "target", "peak [MB]", "target", "load"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for row in result["rows"]:
        found = row["measured"]
        table.add_row(
            row["decoder"],
            f"{row['customers']:,}",
            "yes" if row["keep"] else "no",
            f"{found['caught']} of {row['colluders']}",
            f"{found['cold_seconds']:.2f}",
            "-" if found["warm_seconds"] is None else f"{found['warm_seconds']:.2f}",
            "-" if row["seconds"] is None else f"{row['seconds']:g}",
            f"{found['peak_megabytes']:.0f}",
            "-" if row["megabytes"] is None else f"{row['megabytes']:g}",
            f"{found['load_average']:.1f}",
        )
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    rows = result["rows"]
    names = [f"{r['decoder']}, N = {r['customers']:,}" + ("" if r["keep"] else "\nstatistics not kept") for r in rows]
    places = np.arange(len(rows))
    with sections.figure(path, 9, 1.4 + 0.6 * len(rows)) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        warm = [row["measured"]["warm_seconds"] or row["measured"]["cold_seconds"] for row in rows]
        left.barh(places, warm, color="#c0392b")
        left.set_xlabel("seconds (warm where run twice); bars: target")
        right.barh(places, [row["measured"]["peak_megabytes"] for row in rows], color="#2c6fa8")
        right.set_xlabel("peak megabytes of the process; bars: target")
        for place, row in zip(places, rows, strict=True):
            for axes, target in ((left, row["seconds"]), (right, row["megabytes"])):
                if target:
                    axes.vlines(target, place - 0.45, place + 0.45, color="0.1", lw=2)
        left.set_yticks(places, names, fontsize=8)
        left.invert_yaxis()


if __name__ == "__main__":
    _customers, _decoder, _colluders, *_rest = sys.argv[1:]
    _m, _seed, _keep = (*map(int, _rest), *(304, 0, 1)[len(_rest) :])
    print(json.dumps(measure(int(_customers), _decoder, int(_colluders), _m, _seed, bool(_keep))))  # pyright: ignore[reportArgumentType]
