"""One side of a race, in its own process: it sets up a case, then runs one of its arms on request.

The first line of standard input is JSON with the case; each later line names an arm. A JSON line answers each. A side
is a module with ``CASES``, functions that return a case's arms, and with ``device()`` and ``device_peak()``. An arm is
a function that returns its results when its work is done; a result ``seconds`` replaces its wall time.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path


def memory(what: str) -> float | None:
    """Megabytes of this process: VmRSS now, VmHWM at most so far; None where there is no /proc."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{what}:")[1].split()[0]) * 1024 / 1e6 if status.exists() else None


def main() -> None:
    # Output printed by libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):  # before NumPy, JAX and PyTorch count the available cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: order["threads"]])
    side = importlib.import_module(f"experiments.benchmarks.{sys.argv[1]}_side")
    imported = memory("VmRSS")
    arms = side.CASES[order["case"]](**order["params"])
    print(json.dumps({"arms": list(arms), "imported": imported, "device": side.device()}), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        facts = arms[line.strip()]() or {}
        seconds = facts.pop("seconds", time.perf_counter() - began)
        answer = {"seconds": seconds, "facts": facts, "peak": memory("VmHWM"), "device_peak": side.device_peak()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
