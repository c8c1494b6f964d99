"""How long an owner waits: from an ONNX file and images to the first copy, and from a quantised suspect to the verdict.

Each command runs twice. The first run finds no compiled programs, as on a machine that never saw the network.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments.common import real, sections
from experiments.formats.conversion import EXPORTED, running

_COMMANDS = ("add-model", "issue", "trace")


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks, and how many natural images their owner has: a third makes the shape, the others measure the cost."""

    networks: tuple[str, ...] = ("OpenNSFW", "EfficientNet-Lite0")
    images: int = 96


QUICK = Config(("OpenNSFW",), 48)
FULL = Config()


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(2 * len(config.networks))
    return {"cores": os.cpu_count(), "rows": [_row(network, config, seed, meter) for network in config.networks]}


def _row(network: str, config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    row: dict[str, Any] = {"network": network}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            base, images = _prepared(network, config.images, seed, folder)
            from experiments.formats.conversion import by_onnxruntime
        except (running.Absent, ImportError) as error:
            return row | {"absent": str(error)}
        for lap in ("first", "again"):
            seconds, said = _lap(base, images, by_onnxruntime.quantised, folder, folder / lap)
            row |= {lap: seconds, "agreement": said["agreement"], "T": said["T"]}
            meter.step(f"{network}: {lap}")
    return row


def _prepared(network: str, number: int, seed: int, folder: Path) -> tuple[Path, np.ndarray]:
    """The network as ONNX, and images [B H W C] in its form; ``images.npz`` has them in the file's layout."""
    made = real.efficientnet_lite0() if network == "EfficientNet-Lite0" else real.opennsfw()
    images = np.asarray(made.preprocess(real.natural_images("shape", number).images), np.float32)
    base = running.base(network, seed, folder)
    first = base.suffix != ".onnx"  # PyTorch's have the channels first
    if first:
        running.run(sys.executable, "export", network, str(base), str(folder))
        base = folder / EXPORTED
    np.savez(folder / "images.npz", images=images.transpose(0, 3, 1, 2) if first else images)
    return base, images


def _lap(base: Path, images: np.ndarray, quantised: Any, folder: Path, here: Path) -> tuple[dict[str, float], Any]:
    """Seconds of each command in a vault of its own, and what copies cost and the leaker's T."""
    here.mkdir()
    seconds: dict[str, float] = {}

    def smark(*arguments: str) -> Any:
        environment = os.environ | {"SMARK_PASSPHRASE": "of an experiment", "XDG_CACHE_HOME": str(folder)}
        began = time.perf_counter()
        done = subprocess.run(
            [*sections.SMARK, *arguments, "--json"],
            env=environment,
            cwd=here,
            check=True,
            capture_output=True,
            text=True,
        )
        seconds[arguments[0]] = time.perf_counter() - began
        return json.loads(done.stdout)

    smark("init", "vault")
    added = smark("add-model", "vault", "network", str(base), "--images", str(folder / "images.npz"))
    issued = smark("issue", "vault", "network", "Ada", "Grace", "Mallory", "--out", "copies")
    quantised(here / issued["files"][-1], images[:8], here / "suspect.onnx")
    verdict = smark("trace", "vault", "network", "suspect.onnx")
    (accused,) = verdict["suspects"][0]["accused"]
    assert accused["customer"] == "Mallory", verdict
    cost = added["cost"]["mean"]
    return {name: seconds[name] for name in _COMMANDS}, {"agreement": cost["agreement"], "T": accused["statistic"]}


def show(console: rich.console.Console, result: sections.Result) -> None:
    title = f"Seconds on {result['cores']} cores: the first time, and with programs compiled before"
    table = rich.table.Table("network", *_COMMANDS, "to the first copy", "T of int8", title=title, title_justify="left")
    for row in result["rows"]:
        if "absent" in row:
            console.print(f"{row['network']}: {row['absent']}", markup=False, highlight=False)
            continue
        laps = row["first"], row["again"]
        cells = [f"{laps[0][name]:.0f}, {laps[1][name]:.0f}" for name in _COMMANDS]
        copy = ", ".join(f"{lap['add-model'] + lap['issue']:.0f}" for lap in laps)
        table.add_row(row["network"], *cells, copy, f"{row['T']:.1f}")
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    rows = [row for row in result["rows"] if "absent" not in row]
    bars = [(f"{row['network']}, {lap}", row[lap]) for row in rows for lap in ("first", "again")]
    with sections.figure(path, 6, 1.2 + 0.4 * len(bars)) as figure:
        axes, left = figure.subplots(), np.zeros(len(bars))
        for name in _COMMANDS:
            widths = np.array([seconds[name] for _, seconds in bars])
            axes.barh([label for label, _ in bars], widths, left=left, label=name)
            left += widths
        axes.invert_yaxis()
        axes.set(xlabel="seconds")
        axes.legend()
