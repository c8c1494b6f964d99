"""What the sections share: progress, confidence intervals, pictures, names of decoders."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
from scipy import stats

from smark_jax import keys, tracing

DECODERS = ("joint", "sequential", "single")
Result = dict[str, Any]
_SECONDS_A_LOG_LINE = 20


class Meter:
    """One line of a progress display; in a log, a line now and then."""

    def __init__(self, progress: rich.progress.Progress | None = None, name: str = "") -> None:
        self._progress = progress
        self._name, self._printed = name, time.monotonic()
        self._task = progress.add_task(name, total=None, note="") if progress else rich.progress.TaskID(0)

    def start(self, total: int) -> None:
        if self._progress:
            self._progress.reset(self._task, total=total)

    def step(self, note: str = "", advance: int = 1) -> None:
        if self._progress:
            self._progress.update(self._task, advance=advance, note=note)
            if not self._progress.console.is_terminal and time.monotonic() - self._printed > _SECONDS_A_LOG_LINE:
                self._printed = time.monotonic()
                task = self._progress.tasks[self._task]
                self._progress.console.print(f"{self._name} {task.completed:.0f} of {task.total:.0f}: {note}")

    def finish(self) -> None:
        """The steps were planned as an upper bound, so the line may end early."""
        if self._progress:
            task = self._progress.tasks[self._task]
            self._progress.update(self._task, total=task.completed or 1, completed=task.completed or 1)


def master_key(seed: int, section: str) -> keys.SecretKey:
    return keys.derive(keys.from_bytes(seed.to_bytes(32, "big")), "experiments.collusion", section)


def interval(events: int, trials: int, confidence: float = 0.999) -> tuple[float, float]:
    """Clopper-Pearson's exact interval of a probability."""
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(stats.beta.ppf(1 - tail, events + 1, trials - events)) if events < trials else 1.0
    return low, high


def extrapolation(colluders: int, magnitude: float = 0.9) -> np.ndarray:
    """The shares of :func:`smark_jax.attacks.extrapolate`: the first colluder enters negatively."""
    shares = np.full(colluders, (1 + magnitude) / max(1, colluders - 1))
    shares[0] = -magnitude
    return shares


def caught(verdict: tracing.Verdict | Any, coalition: set[int]) -> tuple[int, int]:
    """How many of the coalition, and how many innocents, a verdict accuses."""
    accused = {int(accusation.serial) for accusation in verdict.accused}
    return len(accused & coalition), len(accused - coalition)


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
