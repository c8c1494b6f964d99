"""Races: each side has its own worker process; they run one lap at a time while the others sleep."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
# PyTorch's threads keep spinning for some milliseconds after their work.
_PAUSE = 0.02
_FEWEST_ROUNDS = 3

Timing = dict[str, Any]


class Entry(NamedTuple):
    """Who takes part: a side, the case that it sets up, and which of its arms run (all, if none is named)."""

    side: str
    case: str
    params: Mapping[str, Any]
    arms: tuple[str, ...] = ()


class Setting(NamedTuple):
    """What all workers of a run have in common.

    Attributes:
      threads: cores that a worker may use.
      accelerator: whether both sides run on the GPU rather than on the CPU.
      torch: whether PyTorch is there.
    """

    threads: int
    accelerator: bool
    torch: bool


class Worker:
    """A side that has set up its case and waits."""

    def __init__(self, entry: Entry, setting: Setting) -> None:
        self.entry = entry
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(setting.threads))
        env = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **threads}
        if entry.case == "train":  # PyTorch's is faster where glibc gives no memory back; ours is not
            env |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
        if not setting.accelerator:
            env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmarks.worker", entry.side],
            cwd=ROOT,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        order = {"case": entry.case, "params": dict(entry.params), "threads": setting.threads}
        ready = self._ask(json.dumps(order))
        self.imported, self.device = ready["imported"], ready["device"]
        self.arms = entry.arms or tuple(ready["arms"])

    def lap(self, arm: str) -> dict[str, Any]:
        return self._ask(arm)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout  # both are pipes
        with contextlib.suppress(BrokenPipeError):  # the exit status and the log, read below, say why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            words = self._errors.read()[-3000:]
            self.close()
            cause = "most likely for want of memory" if status == -9 else f"its last words:\n{words}"
            raise RuntimeError(f"The worker for {self.entry} ended with status {status}: {cause}")
        return json.loads(answer)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        self._process.wait()
        self._errors.close()  # harmless when closed already


def race(
    entries: Sequence[Entry],
    setting: Setting,
    rounds: int,
    *,
    seconds: float = 60.0,
    on_lap: Callable[[str], None] = lambda note: None,
) -> list[Timing]:
    """Every arm of every entry once a round, in turn, after one lap each to warm up.

    Args:
      entries: who takes part; those of a side that is not there are left out.
      setting: the run's.
      rounds: how many; fewer, but at least three, once they have taken ``seconds``.
      seconds: see there.
      on_lap: called before each lap with its name.

    Returns:
      For each arm its laps in seconds, their summary, what it found in each lap, and the peak memory of its worker.
    """
    with contextlib.ExitStack() as stack:
        workers = []
        for entry in entries:
            if entry.side == "torch" and not setting.torch:
                continue
            on_lap(f"{entry.side}: set up {entry.case}")
            workers.append(Worker(entry, setting))
            stack.callback(workers[-1].close)
        runners = [(worker, arm) for worker in workers for arm in worker.arms]
        laps: list[list[dict[str, Any]]] = [[] for _ in runners]
        began = time.perf_counter()
        for done in range(rounds + 1):
            for (worker, arm), found in zip(runners, laps, strict=True):
                on_lap(f"{worker.entry.side}: {arm}")
                found.append(worker.lap(arm))
                time.sleep(_PAUSE)
            if done == 0:
                began = time.perf_counter()
            elif done >= _FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
        return [_timing(worker, arm, found) for (worker, arm), found in zip(runners, laps, strict=True)]


def _timing(worker: Worker, arm: str, laps: Sequence[Mapping[str, Any]]) -> Timing:
    counted = laps[1:]
    return {
        "side": worker.entry.side,
        "case": worker.entry.case,
        "arm": arm,
        "params": dict(worker.entry.params),
        "device": worker.device,
        **summary([lap["seconds"] for lap in counted]),
        "first_lap": laps[0]["seconds"],
        "facts": {name: [lap["facts"][name] for lap in counted] for name in counted[0]["facts"]},
        "imported_mb": worker.imported,
        "peak_mb": laps[-1]["peak"],
        "device_peak_mb": laps[-1]["device_peak"],
    }


def summary(laps: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(laps, n=4, method="inclusive") if len(laps) > 1 else [laps[0]] * 3
    return {"laps": list(laps), "median": median, "quartiles": [low, high]}


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long ``a`` takes as ``b``: the median over rounds, so that a drifting machine moves both."""
    return statistics.median(x / y for x, y in zip(a["laps"], b["laps"], strict=True))


def find(timings: Sequence[Timing], side: str, arm: str, **params: Any) -> Timing | None:
    """The timing of an arm; None when its side did not run."""
    for timing in timings:
        wanted = timing["side"] == side and timing["arm"] == arm
        if wanted and all(timing["params"].get(name) == value for name, value in params.items()):
            return timing
    return None


def rates(timings: Sequence[Timing]) -> dict[str, float]:
    """By arm: the amounts (bytes, operations) that its laps report, per second."""
    return {timing["arm"]: timing["facts"]["amount"][0] / timing["median"] for timing in timings}


def setting() -> Setting:
    """This machine's: all cores that this process may use; a GPU only where both sides find it."""
    torch = importlib.util.find_spec("torch") is not None
    gpu = devices().platform == "gpu"
    if gpu and torch:
        gpu = _prints("import torch; print(torch.cuda.is_available())") == "True"
    return Setting(threads(), gpu, torch)


def threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Devices(NamedTuple):
    """What JAX computes on: "cpu", "gpu" or "tpu", the name of the first device, and how many there are."""

    platform: str
    kind: str
    number: int


@functools.cache
def devices() -> Devices:
    """The devices of this machine, seen by a process of its own: whoever looks takes a TPU away from the workers."""
    code = "import jax, json; d = jax.devices(); print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))"
    return Devices(*json.loads(_prints(code)))


def _prints(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Python could not tell which devices there are; its last words:\n{done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def machine(setting: Setting, device: str, seed: int) -> dict[str, Any]:
    """What a reader of the results must know of the machine and the run."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    packages = ("jax", "jaxlib", "numpy", "torch") if setting.torch else ("jax", "jaxlib", "numpy")
    return {
        "cpu": cpu,
        "device": device,
        "seed": seed,
        "threads": setting.threads,
        "accelerator": setting.accelerator,
        "torch": setting.torch,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "load_average": os.getloadavg()[0],
    }
