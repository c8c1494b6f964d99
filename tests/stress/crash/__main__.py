"""Kill the desk at random moments, and check that nothing is lost.

    PYTHONPATH=tests python -m stress.crash
    PYTHONPATH=tests python -m stress.crash --kills 200 --copies 1000 --out out/crash

Half of the kills hit ``smark issue``, half ``smark trace``. Writes crash.json after each; exit code 1 when anything was
lost.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from experiments.common import sections
from stress.crash import kills


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stress.crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/crash"))
    options = parser.parse_args(arguments)
    console = rich.console.Console()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "crash.json"
    result: dict[str, Any] = {"kills": options.kills, "copies": options.copies, "seed": options.seed}
    began, rng = time.monotonic(), random.Random(options.seed)
    shares = {"issue": options.kills - options.kills // 2, "trace": options.kills // 2}
    with rich.progress.Progress(console=console) as progress, tempfile.TemporaryDirectory() as folder:
        meter = sections.Meter(progress, "kills")
        meter.start(options.kills)
        for job, share in shares.items():

            def step(found: kills.Result, note: str, job: str = job) -> None:
                result.update({job: found, "seconds": round(time.monotonic() - began, 1)})
                path.write_text(json.dumps(result, indent=2) + "\n")
                meter.step(f"{job}: {note}")

            # Losses found after the last kill, when the job was completed, are in it as well.
            result[job] = getattr(kills, job)(Path(folder), share, options.copies, rng, step)
    result["seconds"] = round(time.monotonic() - began, 1)
    path.write_text(json.dumps(result, indent=2) + "\n")
    lost = result["issue"]["losses"] + result["trace"]["losses"]
    console.print(f"{options.kills} kills, {len(lost)} losses; {path}; {result['seconds']:.0f} seconds.")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
