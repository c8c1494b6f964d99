"""One side of a race, in a process of its own: it sets a case up, then runs one of its arms whenever it is asked to.

Standard input brings one JSON line with the case, then the name of an arm on each line; a JSON line answers each. A
side is a module with ``CASES``, functions that return a case's arms, and ``device()`` and ``device_peak()``. An arm is
a function that returns when its work is done, with what it found; ``seconds`` among that replaces its wall time.
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
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):  # before numpy, JAX and PyTorch count the cores that they may use
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
