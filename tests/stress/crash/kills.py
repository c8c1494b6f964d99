"""Processes of ``smark issue`` and ``smark trace`` that are killed at random moments, and what is checked after each.

After every kill the vault is opened, which verifies the log and every table, and compared with what it was before:

- the master key's file has the same bytes, and the log begins with the same entries;
- all customers are there who were;
- every copy under its own name has a hash that the vault knows.

A job that was killed is run again, until it completes; then each customer has one copy, whose one hash is known.
"""

import csv
import hashlib
import os
import random
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import vault
from smark_jax.vault import customers, models

SECRET = "killed nine times out of ten"
SMARK = Path(sysconfig.get_path("scripts")) / "smark"
# A base of few weights, so that time goes into what is to be interrupted.
SHAPES = {"dense/bias": (200,), "dense/kernel": (100, 200)}
_SECONDS = 600.0


class State(NamedTuple):
    """What a vault holds: digests of the key file and of the log entries in order, customers, hashes of copies."""

    key: str
    log: tuple[bytes, ...]
    customers: frozenset[tuple[int, str]]
    copies: frozenset[str]
    verdicts: int


def state(folder: Path) -> State:
    """Opens a vault, which verifies all of it."""
    with vault.opened(folder, SECRET) as desk:
        rows = desk.connection.execute
        return State(
            hashlib.sha256((folder / "master.key").read_bytes()).hexdigest(),
            tuple(mac for (mac,) in rows("SELECT mac FROM log ORDER BY number")),
            frozenset((customer.serial, customer.name) for customer in customers.registered(desk)),
            frozenset(sha256 for (sha256,) in rows("SELECT sha256 FROM copies")),
            rows("SELECT count(*) FROM verdicts").fetchone()[0],
        )


def losses(before: State, after: State, out: Path) -> list[str]:
    """What was lost between two states, and the copies on the disk that the vault does not know."""
    found = []
    if after.key != before.key:
        found.append("the key's file changed")
    if after.log[: len(before.log)] != before.log:
        found.append("log entries were lost")
    if not after.customers >= before.customers:
        found.append("customers were lost")
    if not after.copies >= before.copies:
        found.append("hashes of copies were lost")
    for path in sorted(out.glob("*.safetensors")):
        if hashlib.sha256(path.read_bytes()).hexdigest() not in after.copies:
            found.append(f"the vault does not know {path.name}")
    return found


class Bench(NamedTuple):
    """A vault with a model, a list of customers, and the folder for their copies."""

    vault: Path
    names: Path
    out: Path

    @property
    def issuing(self) -> list[str]:
        return ["issue", str(self.vault), "net", "--csv", str(self.names), "--out", str(self.out), "--json"]


def prepare(folder: Path, copies: int) -> Bench:
    """A new vault."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    vault.create(folder / "vault", SECRET)
    with vault.opened(folder / "vault", SECRET) as desk:
        models.add(desk, "net", {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()})
    with (folder / "customers.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name"], *([f"customer {place}"] for place in range(copies))])
    return Bench(folder / "vault", folder / "customers.csv", folder / "copies")


def start(bench: Bench, arguments: list[str]) -> subprocess.Popen[bytes]:
    """A command in a process of its own, which compiles nothing that was compiled before.

    It takes programs from the folder that the environment names, such as that of the test suite.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(bench.vault.parent.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**cache, **os.environ, "SMARK_PASSPHRASE": SECRET}
    return subprocess.Popen(
        [str(SMARK), *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(bench: Bench, arguments: list[str]) -> tuple[float, float]:
    """Runs a command to its end; the seconds it took, and how many of them after the first new copy."""
    began = time.monotonic()
    process = start(bench, arguments)
    _first_copy(process, bench)
    first = time.monotonic()
    if code := process.wait(_SECONDS):
        raise RuntimeError(f"smark {' '.join(arguments)}: exit code {code}")
    return time.monotonic() - began, time.monotonic() - first


def _first_copy(process: subprocess.Popen[bytes], bench: Bench) -> None:
    """Waits until a copy more is there, or the process has ended."""
    there = sum(1 for _ in bench.out.glob("*.safetensors"))
    while process.poll() is None and sum(1 for _ in bench.out.glob("*.safetensors")) == there:
        time.sleep(0.005)


def killed(bench: Bench, arguments: list[str], seconds: float, after_a_copy: bool = False) -> bool:
    """Runs a command and kills it after so many seconds (of work); False when it had ended by then."""
    process = start(bench, arguments)
    if after_a_copy:
        _first_copy(process, bench)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


Result = dict[str, Any]


def issue(
    folder: Path, kills: int, copies: int, rng: random.Random, step: Callable[[Result, str], None] = lambda *args: None
) -> Result:
    """Kills ``smark issue`` so many times; a job that completes is followed by one with a new vault.

    Args:
      folder: for vaults and copies.
      kills: how many.
      copies: of a job.
      rng: of the moments.
      step: called after each kill with the result so far, and how far the job is.
    """
    bench = prepare(folder / "timed", copies)
    finish(bench, bench.issuing)  # compiles
    bench = prepare(folder / "timed again", copies)
    whole, writing = finish(bench, bench.issuing)
    found: list[str] = []
    stages = {"before the first copy": 0, "between copies": 0, "after the last copy": 0}
    result: Result = {
        "kills": 0,
        "jobs": 0,
        "killed": stages,
        "seconds_uninterrupted": round(whole, 1),
        "losses": found,
    }
    while result["kills"] < kills:
        result["jobs"] += 1
        bench = prepare(folder / f"issue-{result['jobs']}", copies)
        before = state(bench.vault)
        # Some before the first copy, most while copies are written: a tenth of them at a time, so that jobs are long.
        while result["kills"] < kills:
            early = rng.random() < 0.25
            moment = rng.uniform(0, whole - writing) if early else rng.uniform(0, writing / 10)
            was_killed = killed(bench, bench.issuing, moment, after_a_copy=not early)
            after = state(bench.vault)
            found += losses(before, after, bench.out)
            before = after
            if not was_killed:
                break
            result["kills"] += 1
            there = len(list(bench.out.glob("*.safetensors")))
            stage = "between copies" if 0 < there < copies else "before the first copy" if not there else None
            stages[stage or "after the last copy"] += 1
            step(result, f"{there} copies")
        finish(bench, bench.issuing)
        after = state(bench.vault)
        found += losses(before, after, bench.out)
        there = list(bench.out.glob("*.safetensors"))
        if (len(there), len(after.copies), len(after.customers)) != (copies, copies, copies):
            found.append(f"job {result['jobs']} did not complete: {len(there)} copies, {len(after.copies)} hashes")
        if any(path.suffix != ".safetensors" for path in bench.out.iterdir()):
            found.append(f"job {result['jobs']} left other files")
    return result


def trace(
    folder: Path, kills: int, copies: int, rng: random.Random, step: Callable[[Result, str], None] = lambda *args: None
) -> Result:
    """Kills ``smark trace`` so many times, over a vault with all copies issued; arguments as for :func:`issue`."""
    bench = prepare(folder / "trace", copies)
    finish(bench, bench.issuing)
    suspect = sorted(bench.out.glob("*.safetensors"))[copies // 2]
    arguments = ["trace", str(bench.vault), "net", str(suspect), "--json"]
    finish(bench, arguments)  # compiles
    whole, _ = finish(bench, arguments)
    found: list[str] = []
    before = state(bench.vault)
    result: Result = {"kills": 0, "verdicts_kept": 0, "seconds_uninterrupted": round(whole, 1), "losses": found}
    while result["kills"] < kills:
        was_killed = killed(bench, arguments, rng.uniform(0, 1.05 * whole))
        after = state(bench.vault)
        found += losses(before, after, bench.out)
        result["verdicts_kept"] += after.verdicts - before.verdicts
        if not was_killed and after.verdicts != before.verdicts + 1:
            found.append("a verdict was lost")
        before = after
        result["kills"] += was_killed
        step(result, f"{after.verdicts} verdicts")
    finish(bench, arguments)
    if state(bench.vault).verdicts != before.verdicts + 1:
        found.append("tracing again did not complete")
    return result
