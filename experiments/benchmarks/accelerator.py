"""An accelerator by itself: is what it computes right, and how fast is it beside its own limits, within minutes."""

import contextlib
import dataclasses
import functools
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import accelerator_report, floor_side, network_sizes, race
from experiments.benchmarks.compare import CNN_WEIGHTS
from experiments.benchmarks.race import Entry, Timing
from experiments.common import sections


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; ``rounds`` of each race, fewer where they would take more than ``seconds``.

    A race that would not end within ``minutes`` of the start is left out. ``parties`` share the CPU where there is no
    accelerator; else each device is one. The rates come from ``megabytes`` and from square matrices of ``matrix`` rows.
    """

    minutes: float
    rounds: int
    seconds: float
    num_weights: tuple[int, ...]
    mask_words: tuple[int, ...]
    batch: int
    model: str
    copies: int
    customers: tuple[int, ...]
    megabytes: int
    matrix: int
    parties: int = 2
    mask_parties: int = 4
    num_chips: int = 304


QUICK = Config(
    1,
    3,
    1,
    num_weights=(10**6,),
    mask_words=(CNN_WEIGHTS,),
    batch=16,
    model="ResNet-18",
    copies=10,
    customers=(10**5,),
    megabytes=64,
    matrix=1024,
)
FULL = Config(
    6,
    7,
    4,
    num_weights=(10**7, 10**8),
    mask_words=(CNN_WEIGHTS, 10**8),
    batch=256,
    model="ViT-L/16",
    copies=100,
    customers=(10**6, 10**7, 10**8, 10**9),
    megabytes=1000,
    matrix=8192,
)

# Seconds that a race is expected to take before there is one of its case to tell: most of it is compilation.
_FIRST_OF_ITS_CASE = 20.0
# A verdict among more customers takes so long that one lap has to do.
_MANY_CUSTOMERS = 10**8


class Row(NamedTuple):
    """A race, and what is known about it beforehand.

    Attributes:
      name: of the sizes.
      entries: who takes part, one process at a time on the device.
      rounds: at most.
      size: grows as the time of a lap does between rows of one case.
      floor: the case and the parameters that :func:`experiments.benchmarks.floor_side.floor` knows it by.
    """

    name: str
    entries: tuple[Entry, ...]
    rounds: int
    size: int
    floor: tuple[str, Mapping[str, Any]]


def folder(kind: str) -> str:
    """The name of a device as that of a folder.

    Examples:
      >>> folder("NVIDIA H100 80GB HBM3")
      'NVIDIA-H100-80GB-HBM3'
    """
    return re.sub("[^A-Za-z0-9]+", "-", kind).strip("-") or "device"


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    began = time.monotonic()
    found = race.devices()
    setting = race.Setting(race.threads(), found.platform != "cpu", torch=False)
    parties = found.number if setting.accelerator else config.parties
    rows = _rows(config, parties, setting, seed)
    tell = lambda note: meter.step(note, 0)  # noqa: E731
    meter.start(2 + len(rows))
    order = Entry("device", "checks", {"parties": parties, "seed": seed})
    checks = meter.part("checks", 0, lambda: _checks(order, setting, tell))
    meter.step("checks")
    rates = meter.part("rates", 0, lambda: _rates(config, setting, tell))
    meter.step("rates")
    measured: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        left = 60 * config.minutes - (time.monotonic() - began)
        compute = lambda row=row, left=left: _measure(row, measured, left, config, setting, tell)  # noqa: E731
        measured.append(meter.part(f"row {number}", 0, compute))
        _add_floors(row, measured[-1]["timings"], rates)
        meter.step(row.name)
    machine = race.machine(setting, found.kind, seed)
    return {"machine": machine, "devices": found.number, "rates": rates, "checks": checks, "rows": measured}


def _rows(config: Config, parties: int, setting: race.Setting, seed: int) -> list[Row]:
    """The races in order of importance, as the last may find no time."""
    chips = {"num_chips": config.num_chips, "seed": seed}
    rows: list[Row] = []

    def add(name: str, entry: Entry, size: int = 1, *more: Entry, rounds: int = config.rounds, **floor: Any) -> None:
        case = floor.pop("case", entry.case)
        rows.append(Row(name, (entry, *more), rounds, size, (case, {**entry.params, **floor})))

    for size in config.num_weights:
        arms = ("spread", "despread", "embed", "extract")
        add(f"D = {size:,}", Entry("jax", "weights", {"num_weights": size, **chips}, arms), size)
    for size in config.mask_words:
        params = {"parties": config.mask_parties, "num_words": size, "seed": seed}
        add(f"P = {config.mask_parties}, D = {size:,}", Entry("jax", "party", params), size)
    for engine, arms in (("pmap", ("plain", "masks and fingerprint")), ("shard_map", ("masks and fingerprint",))):
        params = {"parties": parties, "batch": config.batch, "engine": engine, "seed": seed}
        each = parties if not setting.accelerator else 1  # devices work side by side
        add(f"{engine}, P = {parties}", Entry("jax", "train", params, arms), parties=each)
    params = {"name": config.model, "dtype": "float32", "folder": "", **chips}
    weights = sum(math.prod(shape) for shape in network_sizes.NAMED[config.model]().values())
    add(config.model, Entry("jax", "model", params, ("embed", "extract")), case="weights", num_weights=weights)
    disk = {"num_copies": config.copies, "folder": ""}
    bare = Entry("floor", "disk", {**disk, "num_bytes": 4 * CNN_WEIGHTS})
    add(f"{config.copies} copies of the CNN", Entry("device", "issue", {**disk, "seed": seed}, ("issue",)), 1, bare)
    for size in config.customers:
        params = {"num_customers": size, "decoder": "single", "keep": False, **chips}
        rounds = 1 if size >= _MANY_CUSTOMERS else config.rounds
        add(f"N = {size:,}", Entry("jax", "verdict", params), size, rounds=rounds)
    return rows


def _checks(order: Entry, setting: race.Setting, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Each check's result. One that takes its process down fails; the others go on in another."""
    found, worker = [], race.Worker(order, setting)
    try:
        for name in worker.arms:
            tell(f"check {name}")
            try:
                facts = worker.lap(name)["facts"]
            except RuntimeError as error:
                facts = {"passed": False, "found": _last_line(error)}
                worker = race.Worker(order, setting)
            found.append({"name": name, **facts})
    finally:
        worker.close()
    return found


def _rates(config: Config, setting: race.Setting, tell: Callable[[str], None]) -> dict[str, float]:
    """Bytes and operations a second of the device, and of OpenSSL on the host; nothing where the device fails."""
    device = Entry("device", "rates", {"megabytes": config.megabytes, "matrix": config.matrix})
    host = Entry("floor", "rates", {"megabytes": 64, "matrix": 64, "threads": setting.threads}, ("keystream",))
    measure = functools.partial(race.race, setting=setting, rounds=config.rounds, seconds=config.seconds, on_lap=tell)
    try:
        found = race.rates(measure([device]))
    except RuntimeError:  # the checks say more
        return {}
    return {**found, "openssl": race.rates(measure([host]))["keystream"]}


def _measure(
    row: Row,
    before: Sequence[Mapping[str, Any]],
    left: float,
    config: Config,
    setting: race.Setting,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The timings of a row, or none and the reason."""
    case = row.entries[0].case
    about = {"name": row.name, "case": case, "size": row.size, "timings": [], "wall": 0.0}
    needed = expected(row, before)
    if needed > left:
        return about | {"left_out": f"would take about {needed:.0f} s, and {max(0, left):.0f} s are left"}
    began = time.monotonic()
    try:
        timings = _race(row, config, setting, tell)
    except RuntimeError as error:
        return about | {"failed": _last_line(error)}
    for timing in timings:
        timing["compile"] = max(0.0, timing["first_lap"] - timing["median"])
    return about | {"timings": timings, "wall": time.monotonic() - began}


def expected(row: Row, before: Sequence[Mapping[str, Any]]) -> float:
    """The seconds that a row will take, going by the last one of its case: its laps grow with the size."""
    known = [other for other in before if other["case"] == row.entries[0].case and other["timings"]]
    if not known:
        return _FIRST_OF_ITS_CASE
    last = known[-1]
    lap = sum(timing["median"] for timing in last["timings"])
    laps = 1 + len(last["timings"][0]["laps"])
    return last["wall"] + lap * ((1 + row.rounds) * row.size / last["size"] - laps)


def _race(row: Row, config: Config, setting: race.Setting, tell: Callable[[str], None]) -> list[Timing]:
    with contextlib.ExitStack() as stack:
        entries = row.entries
        if any("folder" in entry.params for entry in entries):
            Path("out").mkdir(exist_ok=True)
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=".benchmarks-", dir="out"))
            place = {"folder": str(Path(name).absolute())}
            entries = tuple(entry._replace(params={**entry.params, **place}) for entry in entries)
        timings = race.race(entries, setting, row.rounds, seconds=config.seconds, on_lap=tell)
    for timing in timings:  # file paths are private and stay out of the results
        timing["params"].pop("folder", None)
    return timings


def _add_floors(row: Row, timings: Sequence[Timing], rates: Mapping[str, float]) -> None:
    bare = race.find(timings, "floor", "write")
    known = floor_side.Rates(rates["copy"], rates["matmul"], rates["keystream"]) if rates else None
    case, params = row.floor
    for timing in timings:
        if bare:
            timing["floor"] = bare["median"]
        else:
            timing["floor"] = floor_side.floor(known, case, timing["arm"], params) if known else None


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2][:200]


show, picture = accelerator_report.show, accelerator_report.picture
