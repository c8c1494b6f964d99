"""What each command of ``smark`` costs: CPU seconds and peak memory of its process, among few and many customers.

Every command runs in two vaults, one after the other. The first finds no compiled programs; later ones are like the
second. CPU seconds are those of all threads: on a busy machine they vary less than wall time.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from experiments.benchmarks import race, tables
from experiments.common import sections
from smark_jax import files, vault

_PASSPHRASE = "of the benchmark"
_MODEL, _COPIES = "network", 3
# A small process starts the command: Linux counts the memory of whoever starts a process as its own.
_LAUNCHER = """
import json, os, resource, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps([child.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """How many customers have a licence of a network with so many square layers of this width."""

    customers: tuple[int, ...] = (3, 10_000)
    layers: int = 7
    width: int = 256


QUICK = Config()
FULL = Config((3, 1_000_000))


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    setting = race.setting()
    machine = race.machine(setting, "cpu", seed)
    meter.start(2 * len(config.customers))
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for customers in config.customers:
            laps = []
            for _ in range(2):
                with tempfile.TemporaryDirectory() as folder:
                    laps.append(list(_commands(config, customers, seed, Path(folder), cache)))
                meter.step(f"{customers:,} customers")
            rows += [
                {"command": name, "customers": customers, "first_seconds": first, "seconds": seconds, "peak_mb": peak}
                for (name, first, _), (_, seconds, peak) in zip(*laps, strict=True)
            ]
    return {"machine": machine, "rows": rows}


def _commands(
    config: Config, customers: int, seed: int, folder: Path, cache: str
) -> Iterator[tuple[str, float, float]]:
    """An owner's commands in their order in one folder; yields each one's name, CPU seconds and peak in megabytes."""

    def smark(*words: str) -> tuple[str, float, float]:
        env = {**os.environ, "PYTHONPATH": str(race.ROOT), "SMARK_PASSPHRASE": _PASSPHRASE, "XDG_CACHE_HOME": cache}
        env["JAX_PLATFORMS"] = "cpu"
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
        command = (sys.executable, "-c", _LAUNCHER, *sections.SMARK, *words)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
        code, seconds, peak = json.loads(done.stdout)
        if code:
            raise RuntimeError(f"smark {' '.join(words)}: {done.stderr}")
        name = " ".join(words[:2]) if words[0] == "evidence" else words[0]
        return name, seconds, peak * _MAXRSS_BYTES / 1e6

    (folder / "customers.csv").write_text("".join(f"Customer {serial}\n" for serial in range(customers)))
    normal = np.random.default_rng(seed).normal
    shape = (config.width, config.width)
    base = {f"layer{place}/kernel": normal(size=shape).astype(np.float32) for place in range(config.layers)}
    files.write(folder / "base.safetensors", base)
    suspect = f"copies/{customers:06d}-new-0.safetensors"
    yield smark("--help")
    yield smark("init", "vault")
    yield smark("customers", "vault", "--csv", "customers.csv", "--no-heading")
    yield smark("add-model", "vault", _MODEL, "base.safetensors")
    _license_all(folder)
    yield smark("issue", "vault", _MODEL, *(f"new {place}" for place in range(_COPIES)), "--out", "copies")
    yield smark("trace", "vault", _MODEL, suspect)
    yield smark("plan", "vault", _MODEL)
    yield smark("evidence", "export", "vault", "1", "--out", "evidence.json")
    yield smark("evidence", "verify", "evidence.json", suspect, "base.safetensors")


class _Stopped(Exception):
    pass


def _license_all(folder: Path) -> None:
    """Gives every customer a licence but no file: an issue that ends when its first copy would be made."""

    def stop(count: int) -> None:
        raise _Stopped

    with vault.opened(folder / "vault", _PASSPHRASE) as desk:
        everybody = vault.customers.registered(desk)
        with contextlib.suppress(_Stopped):
            vault.issuing.issue(vault.models.get(desk, _MODEL), everybody, folder / "none", on_copy=stop)


def show(console: rich.console.Console, result: sections.Result) -> None:
    console.print(tables.machine_line(result))
    table = rich.table.Table(title="CPU seconds and peak memory of each command", title_justify="left")
    for column in ("command", "customers", "first time, s", "later, s", "MB"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for row in result["rows"]:
        seconds = (f"{row[name]:.2f}" for name in ("first_seconds", "seconds"))
        table.add_row(row["command"], f"{row['customers']:,}", *seconds, f"{row['peak_mb']:.0f}")
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    names = list(dict.fromkeys(row["command"] for row in result["rows"]))
    sizes = list(dict.fromkeys(row["customers"] for row in result["rows"]))
    with sections.figure(path, 10, 4) as figure:
        for axes, what, label in zip(
            figure.subplots(1, 2, sharey=True),
            ("seconds", "peak_mb"),
            ("CPU seconds", "peak memory in MB"),
            strict=True,
        ):
            for place, customers in enumerate(sizes):
                values = [row[what] for row in result["rows"] if row["customers"] == customers]
                height = 0.8 / len(sizes)
                spots = [spot + height * place for spot in range(len(names))]
                axes.barh(spots, values, height, label=f"{customers:,} customers")
            axes.set_yticks([spot + 0.4 - 0.4 / len(sizes) for spot in range(len(names))], names)
            axes.set_xlabel(label)
        figure.axes[0].invert_yaxis()
        figure.axes[0].legend()
