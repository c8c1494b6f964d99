"""One process of the fuzzer: reads the cases of a range and says how each ended.

``python -m stress.fuzz.worker SEED FIRST LAST`` prints one JSON object.
"""

import collections
import json
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from stress.fuzz import mutations
from stress.fuzz.targets import TARGETS, Target


def case(target: Target, seed: int, number: int) -> tuple[str, bytes]:
    """The kind and the content of a case: three of five are valid files broken, two are forgeries."""
    rng = np.random.default_rng([seed, number])
    if rng.random() < 0.6:
        broken = mutations.BREAKS[int(rng.integers(len(mutations.BREAKS)))]
        return f"{target.name}: {broken.__name__}", broken(target.make_valid(rng), rng)
    forge = target.forgeries[int(rng.integers(len(target.forgeries)))]
    return f"forged: {forge.__name__}", forge(rng)


def run(seed: int, first: int, last: int) -> dict[str, Any]:
    """How the cases ended, by kind, and what must not have happened."""
    ends: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path, canary = Path(folder, "suspect"), Path(folder, "canary")
        mutations.Canary.path = str(canary)
        for number in range(first, last):
            target = TARGETS[number % len(TARGETS)]
            kind, content = case(target, seed, number)
            path.write_bytes(content)
            began = time.perf_counter()
            wrong = ""
            try:
                target.read(path)
                end = "read"
            except target.refusal as error:
                end = "refused"
                wrong = "" if str(error).isprintable() and len(str(error)) < 1000 else f"not one line: {error!r}"
            except BaseException:
                end, wrong = "failed", traceback.format_exc(limit=-4)
            slowest = max(slowest, time.perf_counter() - began)
            if canary.exists():
                wrong = "it ran what the file holds"
                canary.rmdir()
            if wrong:
                failures.append({"case": number, "kind": kind, "what": wrong})
            ends[f"{kind}: {end}"] += 1
    return {"ends": dict(ends), "failures": failures, "slowest_seconds": slowest, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """Of this process alone: where there is no /proc, ru_maxrss, which begins at the size of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(run(*(int(argument) for argument in sys.argv[1:]))))
