"""What a licence costs: seconds of each step, the package's size, and eight disputes about one licence."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import rich.console
import rich.table

from experiments.common import sections
from experiments.licence import guilt, parties, subjects
from experiments.licence.subjects import CNN, EFFICIENTNET, Subject
from smark_jax import _trees, codes, errors, extraction, files, keys, licence
from smark_jax.licence import documents

T = TypeVar("T")
STEPS = {
    "request": "customer",
    "check the request": "owner",
    "package": "owner",
    "open the package": "customer",
    "check the challenge, and answer": "customer",
    "check the answer, read, convict": "arbiter",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Each step is timed ``repeats`` times; the base is as in :class:`experiments.licence.guilt.Config`."""

    networks: tuple[str, ...] = (CNN, EFFICIENTNET)
    repeats: int = 3
    base: guilt.Config = guilt.FULL


QUICK = Config((CNN,), repeats=2, base=guilt.QUICK)
FULL = Config()


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(len(config.networks) * (config.repeats + 1))
    found = []
    for name in config.networks:
        meter.step(f"{name}: load, mark, calibrate", 0)
        subject = subjects.load(name, config.base, seed)
        found.append(meter.part(name, 0, functools.partial(_network, subject, config, seed, meter)))
    return {"segments": parties.NUM_SEGMENTS, "parts": parties.NUM_PARTS, "networks": found}


class _Clock:
    """Seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in STEPS}

    def time(self, name: str, act: Callable[[], T]) -> T:
        began = time.perf_counter()
        found = act()
        self.seconds[name].append(time.perf_counter() - began)
        return found


def _network(subject: Subject, config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    owner, arbiter = parties.identity(seed, "owner"), parties.identity(seed, "arbiter")
    code = sections.secret(seed, "experiments.licence", "code")
    (word,) = np.asarray(codes.codebook(code, [0], subject.mark.num_chips))
    clock, sizes = _Clock(), {}
    party, copy = None, None
    for number in range(config.repeats):
        key, customer = keys.new(), licence.Identity(keys.new())
        signed = parties.offer(owner, key)
        made = clock.time(
            "request", lambda signed=signed, who=customer: licence.request(signed, who, 1, arbiter.public)
        )
        party = parties.Party(made.request, made.secrets, customer, key, made.pieces)
        clock.time("check the request", lambda made=made: licence.check(made.request, made.pieces))
        content = clock.time("package", lambda one=party: _packed(subject, one, word, owner))
        copy = clock.time("open the package", lambda one=party, content=content: parties.opened(content, one))
        asked = parties.challenge(party, documents.sha256(b"%d" % number))
        _dispute(subject, party, copy, asked, b"%d" % number, clock)
        sizes = {
            "package": len(content),
            "model": _file_size(subject.base),
            "request": len(documents.dumps(documents.RequestFile(made.request, tuple(p.hex() for p in made.pieces)))),
        }
        meter.step(f"{subject.name}: repeat {number}")
    assert party and copy
    disputes = _disputes(subject, party, copy)
    meter.step(f"{subject.name}: disputes")
    weights = sum(leaf.size for leaf in subject.base.values())
    return {"network": subject.name, "weights": weights, "seconds": clock.seconds, "bytes": sizes, "disputes": disputes}


def _packed(subject: Subject, party: parties.Party, word: np.ndarray, owner: licence.Identity) -> bytes:
    return licence.package(party.signed, subject.base, subject.mark, word, party.key, owner.signing)


def _file_size(base: parties.Leaves) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        files.write(path, base)
        return path.stat().st_size


def _dispute(
    subject: Subject, party: parties.Party, copy: parties.Leaves, asked: licence.Challenge, about: bytes, clock: _Clock
) -> licence.Conviction:
    """One dispute about a leaked copy, as it is."""
    suspect, bundle = documents.sha256(about), documents.sha256(b"bundle" + about)

    def answer() -> documents.SignedAnswer:
        licence.check_challenge(asked, suspect)
        return licence.answer(asked, bundle, party.secrets.choices, party.customer)

    given = clock.time("check the challenge, and answer", answer)

    def verify() -> licence.Conviction:
        licence.check_challenge(asked, suspect)
        words = licence.opened_word(asked, given, bundle)
        tree = _trees.rebuilt(subject.tree, copy)
        values = licence.shifts(extraction.shifts(tree, subject.tree, subject.mark), subject.mark)
        return licence.convict(values, asked, words)

    return clock.time("check the answer, read, convict", verify)


def _disputes(subject: Subject, party: parties.Party, copy: parties.Leaves) -> dict[str, Any]:
    """As many disputes as the licence has parts, and one more, which must be refused."""
    earlier: tuple[documents.Earlier, ...] = ()
    rows = []
    for number in range(parties.NUM_PARTS):
        about = b"dispute %d" % number
        asked = parties.challenge(party, documents.sha256(about), earlier)
        found = _dispute(subject, party, copy, asked, about, _Clock())
        rows.append({"part": asked.parts[0], "T": found.statistic, "log10_p": found.log10_p})
        earlier = (*earlier, documents.Earlier(asked.parts[0], documents.sha256(b"bundle" + about)))
    suspect = documents.sha256(b"one more")
    one_more = parties.challenge(party, suspect)._replace(earlier=earlier)
    try:
        licence.check_challenge(one_more, suspect)
        refused = ""
    except errors.SmarkError as error:
        refused = str(error)
    return {"rows": rows, "refused": refused}


def show(console: rich.console.Console, result: sections.Result) -> None:
    table = rich.table.Table(
        *("step", "who", *(one["network"] for one in result["networks"])),
        title=f"Seconds for {result['segments']:,} choices in {result['parts']} parts: median (largest)",
        title_justify="left",
    )
    for step, who in STEPS.items():
        cells = [one["seconds"][step] for one in result["networks"]]
        table.add_row(step, who, *(f"{np.median(times):.2f} ({max(times):.2f})" for times in cells))
    for who in ("customer", "owner"):
        table.add_row(f"all steps, {who}", who, *(f"{total(one, who):.2f}" for one in result["networks"]))
    for what in ("model", "package", "request"):
        table.add_row(f"bytes: {what}", "", *(f"{one['bytes'][what]:,}" for one in result["networks"]))
    ratios = [one["bytes"]["package"] / one["bytes"]["model"] for one in result["networks"]]
    table.add_row("package / model", "", *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)
    for one in result["networks"]:
        rows = one["disputes"]["rows"]
        parts = ", ".join(str(row["part"]) for row in rows)
        said = "refused" if one["disputes"]["refused"] else "answered"
        least, largest = min(row["T"] for row in rows), max(row["log10_p"] for row in rows)
        console.print(
            f"{one['network']}: {len(rows)} disputes opened parts {parts}; least T {least:.2f}, largest p "
            f"10^{largest:.0f}; one more was {said}."
        )


def total(network: dict[str, Any], who: str) -> float:
    """The median seconds of all steps of one side."""
    return float(sum(np.median(network["seconds"][step]) for step, side in STEPS.items() if side == who))


def picture(path: Path, result: sections.Result) -> None:
    with sections.figure(path, 8, 3) as figure:
        axes = figure.subplots()
        width = 0.8 / len(result["networks"])
        for number, one in enumerate(result["networks"]):
            medians = [float(np.median(one["seconds"][step])) for step in STEPS]
            axes.barh(np.arange(len(STEPS)) + number * width, medians, width, label=one["network"])
        axes.set_yticks(np.arange(len(STEPS)) + 0.4 - width / 2, [f"{step} ({who})" for step, who in STEPS.items()])
        axes.invert_yaxis()
        axes.set_xlabel("median seconds")
        axes.legend(frameon=False)
