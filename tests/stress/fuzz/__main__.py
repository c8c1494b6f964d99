"""Malformed files from strangers, weights and evidence: each is read, or refused in one line; nothing else happens.

A bundle of evidence that was changed and can be read must not hold.

Cases are made from a seed and a number, and read by worker processes of a few thousand cases each: a crash of the
interpreter, a hang, memory and the execution of what a file holds are seen from outside. The result is fuzz.json in the
output folder; the exit code is 1 when any case failed.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

_CASES = {"quick": 3_000, "full": 100_000}
_BATCH = 2_500
_SECONDS_PER_BATCH = 600
_MOST_BYTES = 1_000_000_000
_TESTS = str(Path(__file__).parents[2])  # where the package stress is
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (_TESTS, os.environ.get("PYTHONPATH"))))}
_EXAMPLES = """examples:
  PYTHONPATH=tests python -m stress.fuzz
  PYTHONPATH=tests python -m stress.fuzz --config full --out out/fuzz/full
  PYTHONPATH=tests python -m stress.fuzz --cases 100000 --seed 1
"""


def fuzz(cases: int, seed: int, console: rich.console.Console) -> dict[str, Any]:
    """Runs the cases 0 to ``cases`` of a seed; what each kind came to, and all that went wrong."""
    ends: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    slowest, peak = 0.0, 0
    began = time.perf_counter()
    for first in rich.progress.track(range(0, cases, _BATCH), "fuzz", console=console):
        last = min(first + _BATCH, cases)
        command = [sys.executable, "-m", "stress.fuzz.worker", str(seed), str(first), str(last)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_PER_BATCH, env=_ENVIRONMENT)
            found = json.loads(done.stdout) if done.returncode == 0 else None
            what = f"the process ended with {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired:
            found, what = None, f"no end after {_SECONDS_PER_BATCH} seconds"
        if found is None:
            failures.append({"case": f"{first} to {last - 1}", "kind": "batch", "what": what})
            continue
        ends.update(found["ends"])
        failures += found["failures"]
        slowest, peak = max(slowest, found["slowest_seconds"]), max(peak, found["peak_bytes"])
        if found["peak_bytes"] > _MOST_BYTES:
            failures.append({"case": f"{first} to {last - 1}", "kind": "batch", "what": "more than 1 GB of memory"})
    return {
        "cases": cases,
        "seed": seed,
        "read": sum(count for end, count in ends.items() if end.endswith(": read")),
        "refused": sum(count for end, count in ends.items() if end.endswith(": refused")),
        "failures": failures,
        "peak_bytes": peak,
        "slowest_seconds": round(slowest, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "ends": dict(sorted(ends.items())),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stress.fuzz",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", choices=tuple(_CASES), default="quick", help="quick: 3,000 cases; full: 100,000")
    parser.add_argument("--cases", type=int, help="number of cases (default: that of the config)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the result (default: out/fuzz/CONFIG)")
    options = parser.parse_args(arguments)
    cases = _CASES[options.config] if options.cases is None else options.cases
    if cases < 1 or options.seed < 0:
        parser.error(f"expected at least one case and a seed of at least 0, got {cases} and {options.seed}")
    console = rich.console.Console()
    result = fuzz(cases, options.seed, console)
    out = options.out or Path("out") / "fuzz" / options.config
    out.mkdir(parents=True, exist_ok=True)
    (out / "fuzz.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(
        f"{result['read']:,} read, {result['refused']:,} refused, {len(result['failures']):,} failed; peak "
        f"{result['peak_bytes'] / 1e6:,.0f} MB, slowest {result['slowest_seconds']:g} s; {out / 'fuzz.json'}"
    )
    for failure in result["failures"][:5]:
        console.print(f"case {failure['case']} ({failure['kind']}): {failure['what']}", markup=False)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
