"""Kill the desk at random moments, and check that nothing is lost.

    python -m experiments.crash
    python -m experiments.crash --kills 200 --copies 1000 --out out/crash

Half of the kills hit ``smark issue``, half ``smark trace``. Writes crash.json; exit code 1 when anything was lost.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import rich.console
import rich.progress

from experiments import sections
from experiments.crash import kills


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/crash"))
    options = parser.parse_args(arguments)
    console = rich.console.Console()
    with rich.progress.Progress(console=console) as progress, tempfile.TemporaryDirectory() as folder:
        meter = sections.Meter(progress, "kills")
        meter.start(options.kills)
        result = kills.run(Path(folder), options.kills, options.copies, options.seed, meter.step)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "crash.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    lost = result["issue"]["losses"] + result["trace"]["losses"]
    console.print(f"{options.kills} kills, {len(lost)} losses; {path}; {result['seconds']:.0f} seconds.")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
