"""The abstract's promises next to figures taken from other experiments' result files: nothing is typed by hand."""

import dataclasses
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import rich.console

from experiments.common import sections
from experiments.paper import report

_ROOT = Path(__file__).parent.parent
_POINTS = 0.05  # an attack that costs more accuracy has ruined the model
_NOT_MEASURED = "not measured yet"


class Source(NamedTuple):
    """A figure, the experiment and section whose results hold it, and how to take it from there."""

    promise: str
    package: str
    section: str
    figure: Callable[[dict[str, Any]], str]


@dataclasses.dataclass(frozen=True)
class Config:
    """``digest`` is of all sources: when one changes, the section is made anew."""

    root: str = ""
    digest: str = ""


QUICK = FULL = Config()


def current(config: Config) -> Config:
    """The configuration with the digest of the results as they are now."""
    found = hashlib.sha256()
    for source in SOURCES:
        path = _path(config, source)
        found.update(path.read_bytes() if path.exists() else b"-")
    return dataclasses.replace(config, digest=found.hexdigest()[:16])


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    del seed  # the sources have their own seeds
    meter.start(len(SOURCES))
    rows = []
    for source in SOURCES:
        rows.append(_row(config, source))
        meter.step(f"{source.package} {source.section}")
    return {"rows": rows}


def _path(config: Config, source: Source) -> Path:
    root = Path(config.root) if config.root else _ROOT
    return root / source.package / "results" / f"{source.section}.json"


def _row(config: Config, source: Source) -> dict[str, Any]:
    path = _path(config, source)
    file = f"experiments/{source.package}/results/{source.section}.json"
    row = {"promise": source.promise, "file": file}
    if not path.exists():
        make = (
            f"python -m experiments.{source.package} --only {source.section} --config full "
            f"--out experiments/{source.package}/results"
        )
        return {**row, "figure": _NOT_MEASURED, "command": make, "seed": None, "commit": "", "device": "", "seconds": 0}
    document = sections.kept(path)
    return {
        **row,
        "figure": source.figure(document["result"]),
        "command": report.command(source.package, document),
        "seed": document["seed"],
        "commit": document.get("commit") or _committed(path),
        "device": document["device"],
        "seconds": document["seconds"],
    }


def _committed(path: Path) -> str:
    """The commit that brought the file in its present form; older results do not name the one they were made with."""
    words = ("git", "log", "-1", "--format=%h", "--abbrev=10", "--", path.name)
    try:
        found = subprocess.run(words, cwd=path.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"file of {found}" if found else ""


# --- Figures from the sources ---


def _payload(result: dict[str, Any]) -> str:
    """The smallest strength at which every marked digit is read back from a PNG."""
    rows = [row for row in result["rows"] if row["kind"].startswith("digits") and row["recovered_png"] == 1]
    row = min(rows, key=lambda row: row["strength"])
    return (
        f"accuracy {100 * row['accuracy']:.1f} % on {row['images']:,} marked digits (clean "
        f"{100 * result['clean_accuracy']:.1f} %), all read back, {row['psnr_mean']:.1f} dB PSNR"
    )


def _rewrites(result: dict[str, Any]) -> str:
    found = [one for network in result["networks"] for one in network["compositions"]]
    traced, raw = sum(one["traced"] for one in found), sum(one["traced_unaligned"] for one in found)
    wrong = sum(one["wrong"] for one in found)
    return f"{traced} of {len(found)} traced aligned, {raw} unaligned; {wrong} innocents accused"


def _removal(result: dict[str, Any]) -> str:
    kept = [
        row
        for row in result["rows"]
        if not row["extraction"] and row["attack"] != "none" and row["accuracy"] >= result["accuracy"] - _POINTS
    ]
    wrong = sum(row["wrong"] for row in result["rows"])
    return (
        f"{sum(row['traced'] for row in kept)} of {len(kept)} attacks within {100 * _POINTS:g} points of accuracy "
        f"traced; {wrong} innocents accused"
    )


def _strength(result: dict[str, Any]) -> str:
    return "largest strength " + ", ".join(
        f"{one['network']} {one['all']['strength']:g} ({100 * one['all']['test_mean_drop']:.2f} points)"
        for one in result["calibrations"]
    )


def _capability(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["decoder"] == "joint"]
    parts = (
        f"m {row['m']:,}, {row['snr_db']} dB, N {row['customers']:,}: {'>=' if row['all_open'] else ''}{row['all']}"
        for row in rows
    )
    return "all colluders found in coalitions up to " + "; ".join(parts)


def _real(result: dict[str, Any]) -> str:
    found = [(case, attack) for case in result["cases"] for attack in case["attacks"]]
    caught = sum(attack["caught"] for _, attack in found)
    of = sum(case["colluders"] for case, _ in found)
    innocents = sum(attack["innocents"] for _, attack in found)
    sizes = " and ".join(str(case["colluders"]) for case in result["cases"])
    return (
        f"{caught} of {of} colluders caught, coalitions of {sizes}, N = {result['customers']:,}, "
        f"{len(found)} mixtures; {innocents} innocents accused"
    )


def _null(result: dict[str, Any]) -> str:
    worst = max(result["rows"], key=lambda row: row["rate"])
    control = max(row["rate"] for row in result["controls"])
    return f"worst rate {worst['rate']:.3f} at alpha = {result['alpha']:g}; a broken decoder {control:.2f} (control)"


def _codes(result: dict[str, Any]) -> str:
    sizes = [row["colluders"] for row in result["rows"]]
    size = max(size for size in sizes if size <= 10)
    rows = [row for row in result["rows"] if row["colluders"] == size and row["attack"] == "average"]
    parts = (f"{row['code']} {row['caught_mean']:.1f} (+{row['innocents_mean']:.1f} innocent)" for row in rows)
    return f"caught of {size} who average: " + ", ".join(parts)


def _roc(result: dict[str, Any]) -> str:
    excess = max(row["largest_log10_excess"] for row in result["rows"])
    return f"share of p-values below x: at most {10**excess:.2f} x, {result['innocents_per_curve']:,} innocents a curve"


def _speed(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["measured"]["warm_seconds"] is not None]
    parts = (
        f"{row['customers']:,} {row['decoder']}{', all statistics kept' if row['keep'] else ''} "
        f"{row['measured']['warm_seconds']:.2g} s"
        for row in rows
    )
    return "among " + "; ".join(parts)


def _answers(result: dict[str, Any]) -> str:
    names = [row["attack"] for row in result["copies"][0]["attacks"]]
    counts = (
        f"{name} {sum(copy['attacks'][k]['caught'] for copy in result['copies'])}" for k, name in enumerate(names)
    )
    wrong = sum(row["wrong"] for copy in result["copies"] for row in copy["attacks"])
    wrong += sum(row["wrong"] for row in (*result["averages"], *result["innocent"]))
    return f"of {len(result['copies'])} copies traced by labels: {', '.join(counts)}; {wrong} innocents accused"


def _answers_averages(result: dict[str, Any]) -> str:
    return "caught: " + ", ".join(f"{row['caught']} of {row['colluders']}" for row in result["averages"])


def _answers_accuracy(result: dict[str, Any]) -> str:
    found = [copy["attacks"][0]["accuracy"] for copy in result["copies"]]
    mean = 100 * sum(found) / len(found)
    return (
        f"base {100 * result['base_accuracy']:.1f} %, copies {mean:.2f} % in the mean, {100 * min(found):.1f} % worst"
    )


def _single(result: dict[str, Any]) -> str:
    def better(message: str) -> str:
        rows = [row for row in result["rows"] if row["message"] == message]
        return f"{sum(row['better_than_control'] for row in rows)} of {sum(row['digits'] for row in rows)}"

    masked = [row for row in result["uniformity"] if row["message"] == "masked"]
    uniform = sum(min(row["bytes_p"], row["bits_p"]) >= result["level"] for row in masked)
    return (
        f"digits nearer than the mean digit: {better('unmasked')} unmasked, {better('masked')} masked; masked words "
        f"uniform in {uniform} of {len(masked)} tests"
    )


def _sums(result: dict[str, Any]) -> str:
    parts = (
        f"{row['network']} {row['parties']}: {row['psnr']:.1f} (mean digit {row['control']['psnr']:.1f})"
        for row in result["rows"]
    )
    return "PSNR in dB from the sum, by parties: " + ", ".join(parts)


SOURCES = (
    Source("above 95 % with 304 bits in an input image", "blackbox", "payloads", _payload),
    Source("robust: the function kept, the weights rewritten", "robustness", "rewrites", _rewrites),
    Source("robust: removal attacks", "robustness", "removal", _removal),
    Source("robust: what strength costs", "robustness", "strength", _strength),
    Source("traitors: capacity", "collusion", "capability", _capability),
    Source("traitors: copies of a trained network", "collusion", "real", _real),
    Source("traitors: innocents accused", "collusion", "null", _null),
    Source("traitors: p-values", "collusion", "roc", _roc),
    Source("traitors: other codes", "collusion", "codes", _codes),
    Source("traitors: time", "collusion", "speed", _speed),
    Source("any suspicious model: an API, labels only", "blackbox", "answers", _answers),
    Source("any suspicious model: APIs of averaged copies", "blackbox", "answers", _answers_averages),
    Source("accuracy of copies that answer probes", "blackbox", "answers", _answers_accuracy),
    Source("privacy: one party's message", "inversion", "single", _single),
    Source("privacy: what the sum shows", "inversion", "sums", _sums),
)


def tables(result: sections.Result) -> list[report.Table]:
    return [
        report.Table(
            "The abstract's promises, from the results of the experiments",
            ("promise", "figure", "file", "command", "seed", "commit", "device", "seconds"),
            [
                (
                    row["promise"],
                    row["figure"],
                    row["file"],
                    row["command"],
                    "" if row["seed"] is None else str(row["seed"]),
                    row["commit"],
                    row["device"],
                    f"{row['seconds']:,.0f}" if row["seconds"] else "",
                )
                for row in result["rows"]
            ],
            left=4,
        )
    ]


def show(console: rich.console.Console, result: sections.Result) -> None:
    """Promise and figure only: files and commands are in tables.md, which has the room."""
    (table,) = tables(result)
    report.show(console, [table._replace(columns=table.columns[:2], rows=[row[:2] for row in table.rows], left=2)])
    for row in result["rows"]:
        if row["figure"] == _NOT_MEASURED:
            console.print(f"missing {row['file']}: {row['command']}", markup=False, soft_wrap=True)


def picture(path: Path, result: sections.Result) -> None:
    """Minutes that went into each file."""
    files = {row["file"].removeprefix("experiments/"): row["seconds"] / 60 for row in result["rows"]}
    with sections.figure(path, 7, 0.32 * len(files) + 0.8) as figure:
        axes = figure.subplots()
        axes.barh(range(len(files)), list(files.values()), color="#2c7fb8")
        axes.set_yticks(range(len(files)), list(files), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("minutes to measure (none: missing)")
