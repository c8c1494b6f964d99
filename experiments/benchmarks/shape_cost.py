"""The cost of marks with a shape: time to make the shape, its size beside the model, memory to make and read a copy."""

import dataclasses
import functools

import rich.console

from experiments.benchmarks import compare, race, tables
from experiments.benchmarks.race import Entry, Worker
from experiments.common import sections


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes are made for ``networks`` from ``images`` images; copies of ``models`` or 8 dense layers are read."""

    networks: tuple[str, ...] = ("CNN",)
    images: int = 48
    models: tuple[str, ...] = ("ResNet-18", "over-parametrised")
    num_weights: int = 0
    num_chips: int = 304


QUICK = Config()
FULL = Config(("CNN", "EfficientNet-Lite0", "OpenNSFW"))

# Of two cores; copies of the weights; per cent of the model, for a shape by channel and for one with directions.
_SECONDS, _COPIES, _ROOM, _ROOM_OF_DIRECTIONS = 60, 6, 5, 100
# Of the logits, relative to their RMS.
_CHANGE = 0.02


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    setting = race.setting()
    jobs = [
        Entry("shape_cost", "making", {"network": name, "images": config.images, "seed": seed}, (arm,))
        for name in config.networks
        for arm in ("shape", "weights alone")
    ]
    more = {"num_weights": config.num_weights, "num_chips": config.num_chips, "seed": seed}
    jobs += [
        Entry("shape_cost", "using", {"network": name, **more}, (arm,))
        for name in config.models
        for arm in ("embed", "extract")
    ]
    meter.start(len(jobs))
    laps, targets, device = [], [], ""
    for number, entry in enumerate(jobs):
        found = meter.part(f"job {number}", 0, functools.partial(lap, entry, setting))
        meter.step(f"{entry.params['network']}: {found['arm']}")
        device = found["device"]
        laps.append(found)
        targets += _targets(found)
    return {"machine": race.machine(setting, device, seed), "targets": targets, "laps": laps}


def lap(entry: Entry, setting: race.Setting) -> dict:
    """The first lap in a process of its own, so that compilation counts."""
    started = Worker(entry, setting)
    try:
        (arm,) = started.arms
        return {"network": entry.params["network"], "arm": arm, "device": started.device, **started.lap(arm)}
    finally:
        started.close()


def _targets(lap: dict) -> list[compare.Found]:
    name, found = lap["network"], lap["facts"]
    if lap["arm"] == "weights alone":
        what = f"change of the logits at the default strength of 0.01, from weights alone: {name}"
        return [compare.target(what, found["change"], _CHANGE, at_most=True)]
    if lap["arm"] != "shape":
        what = f"memory of {lap['arm']}: {name}"
        return [compare.target(what, found["copies"], _COPIES, at_most=True, unit="copies of the weights")]
    room, bound = 100 * found["stored"] / found["weights"], _ROOM_OF_DIRECTIONS if found["bases"] else _ROOM
    kind = f"{found['bases']} kernels by direction" if found["bases"] else "by channel"
    return [
        compare.target(
            f"shape of {name}, {found['cpu']:.0f} s of CPU time", lap["seconds"], _SECONDS, at_most=True, unit="s"
        ),
        compare.target(f"shape beside the model: {name}, {kind}", room, bound, at_most=True, unit="%"),
    ]


def show(console: rich.console.Console, result: sections.Result) -> None:
    console.print(tables.machine_line(result))
    compare.show_targets(console, result["targets"])


picture = compare.picture
