"""Gradient inversion: digits from what parties send, unmasked, masked, and summed.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import rich.console
import rich.progress

from experiments.collusion.common import Meter
from experiments.privacy import inversion, sums

SECTIONS: Mapping[str, ModuleType] = {"inversion": inversion, "sums": sums}
_EXAMPLES = """sections:
  inversion  one party's gradient of one digit, unmasked and masked; are masked words uniform?
  sums       the sum over 1 to 32 parties, which masked aggregation does reveal

examples:
  python -m experiments.privacy
  python -m experiments.privacy --only sums --seed 7
  python -m experiments.privacy --config full --out out/privacy/full
"""


def run_section(
    name: str,
    config: Any,
    seed: int,
    out: Path,
    console: rich.console.Console,
    *,
    label: str = "custom",
    fresh: bool = False,
) -> dict[str, Any]:
    """Runs one section unless its result is there, prints its tables, draws its picture, and returns the result."""
    section, path = SECTIONS[name], out / f"{name}.json"
    # As JSON gives it back: tuples are lists there.
    parameters = json.loads(json.dumps(dataclasses.asdict(config)))
    identity = {"section": name, "config": label, "parameters": parameters, "seed": seed}
    document = json.loads(path.read_text()) if path.exists() and not fresh else {}
    if {key: document.get(key) for key in identity} == identity:
        console.print(f"[bold]{name}[/bold]: taken from {path}")
    else:
        columns = (
            rich.progress.TextColumn("{task.description:<9}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
        )
        began = time.perf_counter()
        with rich.progress.Progress(*columns, console=console) as progress:
            result = section.run(config, seed, Meter(progress, name))
        seconds = round(time.perf_counter() - began, 1)
        document = {**identity, "device": str(jax.devices()[0].device_kind), "seconds": seconds, "result": result}
        path.write_text(json.dumps(document, indent=2) + "\n")
    section.show(console, document["result"])
    section.picture(path.with_suffix(".png"), document["result"])
    console.print(f"{name}: {document['seconds']:g} seconds; {path} and {path.with_suffix('.png').name}\n")
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.privacy",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", choices=("quick", "full"), default="quick", help="quick: under three minutes")
    parser.add_argument("--out", type=Path, help="folder for results (default: out/privacy/CONFIG)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), metavar="NAME", help="sections to run")
    parser.add_argument("--fresh", action="store_true", help="run sections again whose results exist")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed: expected a number of at least 0, got {options.seed}")
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=140)  # a log has room for the tables
    out = options.out or Path("out/privacy") / options.config
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for name in options.only or SECTIONS:
        config = getattr(SECTIONS[name], options.config.upper())
        run_section(name, config, options.seed, out, console, label=options.config, fresh=options.fresh)
    console.print(f"Results in {out}; {time.perf_counter() - began:.0f} seconds.")


if __name__ == "__main__":
    main()
