"""Shared by experiments with several sections: the command line, resumable results, progress, pictures.

A section is a module with ``QUICK`` and ``FULL`` (frozen dataclasses), ``run(config, seed, meter)``,
``show(console, result)`` and ``picture(path, result)``; its result consists of JSON values.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import rich.console
import rich.progress

from smark_jax import _io, _validate, keys

Result = dict[str, Any]
_SECONDS_PER_LOG_LINE = 20
_LARGE = 300_000  # characters of results; larger ones are written without spaces
_ROOT = Path(__file__).parents[2]
SMARK = (sys.executable, "-c", "from smark_jax import cli; cli.main()")
"""The command ``smark`` by this interpreter, for a process of its own."""


def secret(seed: int, *names: str) -> keys.SecretKey:
    """The key of these names that follows from a seed, so that an experiment repeats itself."""
    return keys.derive(keys.from_bytes(seed.to_bytes(32, "big")), *names)


class Meter:
    """One line of a progress display; in a log, a line now and then."""

    def __init__(
        self, progress: rich.progress.Progress | None = None, name: str = "", parts: Path | None = None
    ) -> None:
        self._progress, self._parts = progress, parts
        self._name, self._printed = name, time.monotonic()
        self._task = progress.add_task(name, total=None, note="") if progress else rich.progress.TaskID(0)

    def start(self, total: int) -> None:
        if self._progress:
            self._progress.reset(self._task, total=total)

    def step(self, note: str = "", advance: int = 1) -> None:
        if self._progress:
            self._progress.update(self._task, advance=advance, note=note)
            if not self._progress.console.is_terminal and time.monotonic() - self._printed > _SECONDS_PER_LOG_LINE:
                self._printed = time.monotonic()
                task = self._progress.tasks[self._task]
                self._progress.console.print(f"{self._name} {task.completed:.0f} of {task.total:.0f}: {note}")

    def part(self, name: str, steps: int, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``, a JSON value, kept until the section is done so that it can resume."""
        path = self._parts / f"{name}.json" if self._parts else None
        if path and path.exists():
            self.step(f"{name}: from {path}", steps)
            return json.loads(path.read_text())
        found = compute()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            _io.write(path, json.dumps(found).encode())
        return found

    def finish(self) -> None:
        """Completes the line; the planned number of steps was an upper bound."""
        if self._progress:
            task = self._progress.tasks[self._task]
            self._progress.update(self._task, total=task.completed or 1, completed=task.completed or 1)


@contextlib.contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure that is saved at the end, without a display and without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(picture)
    yield picture
    for axes in picture.axes:
        axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path)


def run_section(
    section: ModuleType,
    config: Any,
    seed: int,
    out: Path,
    console: rich.console.Console,
    *,
    label: str = "custom",
    fresh: bool = False,
) -> Result:
    """Runs one section unless its result is there, prints its tables, draws its picture, and returns the result."""
    name = section.__name__.rpartition(".")[2]
    path = out / f"{name}.json"
    # As JSON reads it back, with lists in place of tuples.
    parameters = json.loads(json.dumps(dataclasses.asdict(config)))
    identity = {"section": name, "config": label, "parameters": parameters, "seed": seed}
    document = kept(path) if path.exists() and not fresh else {}
    if {key: document.get(key) for key in identity} == identity:
        console.print(f"[bold]{name}[/bold]: taken from {path}")
    else:
        columns = (
            rich.progress.TextColumn("{task.description:<11}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
        )
        began = time.perf_counter()
        with rich.progress.Progress(*columns, console=console) as progress:
            digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
            parts = out / f"{name}.{digest}.parts"
            if fresh:
                shutil.rmtree(parts, ignore_errors=True)
            resumed = parts.exists()
            meter = Meter(progress, name, parts)
            result = section.run(config, seed, meter)
            meter.finish()
        device = str(jax.devices()[0].device_kind)
        seconds = round(time.perf_counter() - began, 1)
        about = {"commit": commit(), "device": device, "seconds": seconds, "resumed": resumed}
        document = {**identity, **about, "result": result}
        text = json.dumps(document, indent=2)
        path.write_text((text if len(text) < _LARGE else json.dumps(document, separators=(",", ":"))) + "\n")
        shutil.rmtree(parts, ignore_errors=True)
    section.show(console, document["result"])
    section.picture(path.with_suffix(".png"), document["result"])
    console.print(f"{name}: {document['seconds']:g} seconds; {path} and {path.with_suffix('.png').name}\n")
    return document


def kept(path: Path) -> Result:
    """The result of a section as :func:`run_section` wrote it.

    Raises:
      SmarkError: when the file holds anything else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        found, got = None, str(error)
    else:
        got = f"a {type(found).__name__}"
    if not isinstance(found, dict):
        cause = "Was it changed, or left by another program? Run the section again with --fresh, or name another --out."
        raise _validate.fail("experiments", f"the result of a section in {path}", got, cause)
    return found


def commit() -> str:
    """The commit that is checked out, with ``+`` where library or experiments differ from it; empty outside git."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "smark_jax", "experiments/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def parser(package: str, about: str | None, examples: str) -> argparse.ArgumentParser:
    """The command line ``python -m experiments.PACKAGE`` with ``--seed``; every experiment adds its own options."""
    found = argparse.ArgumentParser(
        prog=f"python -m experiments.{package}",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    return found


def sized(package: str, about: str | None, examples: str, quick: str) -> argparse.ArgumentParser:
    """A command line with a quick and a full configuration, whose results have a folder each."""
    found = parser(package, about, examples)
    found.add_argument("--config", choices=("quick", "full"), default="quick", help=f"quick: {quick}")
    found.add_argument("--out", type=folder, help=f"folder for results (default: out/{package}/CONFIG)")
    return found


def command_line(
    package: str, sections: Mapping[str, ModuleType], about: str | None, examples: str
) -> argparse.ArgumentParser:
    """The options that all experiments with sections have; an experiment may add its own."""
    found = sized(package, about, examples, "under three minutes")
    found.add_argument("--only", nargs="+", choices=tuple(sections), metavar="NAME", help="sections to run")
    found.add_argument("--fresh", action="store_true", help="run sections again whose results exist")
    return found


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option: a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return number

    return read


def positive(below: float = math.inf) -> Callable[[str], float]:
    """The type of an option: a number above 0 and below ``below``."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < below:
            bound = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"expected a number above 0{bound}, got {text!r}")
        return number

    return read


def folder(text: str) -> Path:
    """The type of an option: a folder, there or to be made."""
    path = Path(text)
    if any(part.exists() and not part.is_dir() for part in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r} or one below a file")
    return path


def run_sections(
    package: str,
    sections: Mapping[str, ModuleType],
    options: argparse.Namespace,
    configure: Callable[[Any], Any] = lambda config: config,
) -> tuple[Path, rich.console.Console]:
    """Runs the sections that the options ask for; ``configure`` fits a configuration to further options.

    Returns:
      The folder of results, and the console.
    """
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=140)  # wide enough for the tables in a log
    out = options.out or Path("out") / package / options.config
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for name in options.only or sections:
        config = configure(getattr(sections[name], options.config.upper()))
        run_section(sections[name], config, options.seed, out, console, label=options.config, fresh=options.fresh)
    console.print(f"Results in {out}; {time.perf_counter() - began:.0f} seconds.")
    return out, console


def main(
    package: str,
    sections: Mapping[str, ModuleType],
    about: str | None,
    examples: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """The command line ``python -m experiments.PACKAGE``."""
    run_sections(package, sections, command_line(package, sections, about, examples).parse_args(arguments))
