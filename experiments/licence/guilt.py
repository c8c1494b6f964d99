"""Leakers and coalitions, convicted by the secret words of their own licences.

Copies carry both words, as packages give them. A lone leaker opens one part of its word; each part is tried, since any
may be the one that the hash names. Members of a coalition open the whole word. Each customer has segments and keys of
its own, so that the others' words are noise to it. As a control, every suspect is read by licences of customers whose
copies were not used.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from experiments.common import pipeline, sections
from experiments.common.networks import ALPHA, CUSTOMERS
from experiments.licence import parties, subjects
from experiments.licence.subjects import CNN, EFFICIENTNET, Subject
from experiments.robustness.real_networks import harm
from smark_jax import _trees, aggregation, attacks, codes, embedding, extraction, keys, licence, statistics
from smark_jax._types import PyTree
from smark_jax.licence import segments

MIXES: dict[str, Any] = {
    "average": lambda copies, key: attacks.average(copies),
    "median": lambda copies, key: attacks.median(copies),
    "midpoint": lambda copies, key: attacks.min_max(copies),
    "interleave": attacks.interleave,
}
_ALL = tuple(range(parties.NUM_PARTS))


@dataclasses.dataclass(frozen=True)
class Config:
    """``leakers`` are attacked one by one, ``coalitions`` are sizes; ``rebuilt`` are those of averages after R0."""

    networks: tuple[str, ...] = (CNN, EFFICIENTNET)
    leakers: int = 3
    few_leakers: int = 2
    innocents: int = 5
    coalitions: tuple[int, ...] = (2, 3, 5, 10, 20)
    few_coalitions: tuple[int, ...] = (5,)
    rebuilt: tuple[int, ...] = (1, 2, 3, 5, 10, 20)
    epochs: int = 6
    tuning_epochs: int = 5
    train_images: int | None = None
    strength_images: int = 32
    judging_images: int = 60
    num_chips: int = 304
    only: tuple[str, ...] | None = None


QUICK = Config((CNN,), leakers=1, innocents=2, coalitions=(5,), rebuilt=(1, 5), epochs=4, tuning_epochs=2)
FULL = Config()


class Field:
    """A network, its licences, made when they are first needed, and the copies of their customers."""

    def __init__(self, subject: Subject, config: Config, seed: int) -> None:
        self.subject, self.config = subject, config
        self._owner, self._seed = parties.identity(seed, "owner"), seed
        code = sections.secret(seed, "experiments.licence", "code")
        self.words = np.asarray(codes.codebook(code, range(64), config.num_chips))
        self.copy = functools.lru_cache(maxsize=32)(self._copy)
        self.reader = functools.lru_cache(maxsize=32)(self._reader)

    @functools.cache  # noqa: B019  # one field lives as long as its section
    def party(self, number: int) -> parties.Party:
        """The licence of one customer."""
        key = keys.new()
        customer = parties.identity(self._seed, "customer", str(number))
        return parties.agree(parties.offer(self._owner, key), key, customer)

    def _copy(self, number: int) -> PyTree:
        leaves = parties.copy(self.party(number), self.subject.base, self.subject.mark, self.words[number])
        return _trees.rebuilt(self.subject.tree, leaves)

    def _reader(self, number: int) -> parties.Reader:
        return parties.reader(self.party(number), self.subject.mark)

    def shifts(self, suspect: PyTree) -> np.ndarray:
        """The suspect's coordinates that segments use."""
        mark = self.subject.mark
        return licence.shifts(extraction.shifts(suspect, self.subject.tree, mark), mark)

    def chips(self, suspect: PyTree) -> np.ndarray:
        """The owner's reading."""
        return np.asarray(extraction.extract(suspect, self.subject.tree, self.subject.mark))

    @functools.cached_property
    def before(self) -> np.ndarray:
        """The base's logits."""
        return self.subject.logits(self.subject.tree)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    found = []
    meter.start(sum(_steps(name, config) for name in config.networks))
    for name in config.networks:
        meter.step(f"{name}: load, mark, calibrate", 0)
        field = Field(subjects.load(name, config, seed), config, seed)
        names = [one for one in field.subject.attacks if not config.only or one in config.only]
        leakers, sizes = _size(name, config)
        rebuilt = config.rebuilt if field.subject.rebuild else ()
        cost = meter.part(f"{name}_cost", 0, functools.partial(_cost, field, leakers))
        meter.step(f"{name}: cost")
        lone = []
        for attack in names:
            for number in range(leakers):
                one = functools.partial(_lone, field, number, attack)
                lone.append(meter.part(f"{name}_{attack}_{number}".replace(" ", "_"), 0, one))
                meter.step(f"{name}, {attack}: T {lone[-1]['least']:.1f}")
        joint = []
        for size in sizes:
            for mix in MIXES:
                one = functools.partial(_joint, field, size, mix, False, seed)
                joint.append(meter.part(f"{name}_{mix}_{size}", 0, one))
                meter.step(f"{name}, {mix} of {size}: {joint[-1]['convicted']} convicted")
        again = []
        for size in rebuilt:
            one = functools.partial(_joint, field, size, "average", True, seed)
            again.append(meter.part(f"{name}_rebuilt_{size}", 0, one))
            meter.step(f"{name}, R0 of {size}: {again[-1]['convicted']} convicted")
        size = {"coordinates": segments.num_coordinates(field.subject.mark)}
        found.append({"network": name, **size, "cost": cost, "lone": lone, "coalitions": joint, "rebuilt": again})
    eighth = np.ones(parties.NUM_SEGMENTS // parties.NUM_PARTS)
    factor = math.log(parties.NUM_PARTS * 2)
    owner = statistics.threshold(np.ones(config.num_chips), math.log(ALPHA / CUSTOMERS))
    thresholds = {
        "eighth": statistics.threshold(eighth, math.log(ALPHA) - factor),
        "whole": statistics.threshold(np.ones(parties.NUM_SEGMENTS), math.log(ALPHA) - factor),
        "owner": owner,
    }
    return {"alpha": ALPHA, "thresholds": thresholds, "networks": found}


def _size(name: str, config: Config) -> tuple[int, tuple[int, ...]]:
    """The number of leakers, and sizes of coalitions."""
    return (config.leakers, config.coalitions) if name == CNN else (config.few_leakers, config.few_coalitions)


def _steps(name: str, config: Config) -> int:
    """An upper bound."""
    leakers, sizes = _size(name, config)
    return 1 + leakers * subjects.MOST_ATTACKS + len(sizes) * len(MIXES) + len(config.rebuilt)


def _cost(field: Field, number: int) -> dict[str, Any]:
    """What copies cost with both words, and with the owner's alone at full strength."""
    subject, before = field.subject, field.before
    rows: dict[str, list[dict[str, Any]]] = {"both words": [], "one word": []}
    for customer in range(number):
        one = embedding.embed(subject.tree, subject.mark, field.words[customer])
        for name, copy in (("both words", field.copy(customer)), ("one word", one)):
            row: dict[str, Any] = {**harm(before, subject.logits(copy))}
            row["T"] = pipeline.statistic(field.chips(copy), field.words[customer])
            row["accuracy"] = subject.accuracy(copy) if subject.accuracy else None
            rows[name].append(row)
    base = subject.accuracy(subject.tree) if subject.accuracy else None
    return {"images": len(before), "accuracy": base, "strength": float(subject.mark.strength), "rows": rows}


def _judged(field: Field, suspect: PyTree, values: np.ndarray) -> dict[str, Any]:
    """What is left of the network, and the largest |T| of customers who are innocent of it."""
    subject, logits = field.subject, field.subject.logits(suspect)
    wrong, largest = 0, 0.0
    for number in range(field.config.innocents):
        reader = field.reader(63 - number)
        z = reader.read(values)
        for opened in (*((part,) for part in _ALL), _ALL):
            verdict = reader.test(z, opened)
            wrong += verdict.log10_p <= math.log10(ALPHA)
            largest = max(largest, abs(verdict.statistic))
    return {
        "same": float((field.before.argmax(axis=1) == logits.argmax(axis=1)).mean()),
        "accuracy": subject.accuracy(suspect) if subject.accuracy else None,
        "wrong": wrong,
        "innocent": largest,
    }


def _member(field: Field, chips: np.ndarray, values: np.ndarray, number: int) -> dict[str, Any]:
    """One customer's statistics: of each part, of the whole word, and of the owner's."""
    reader = field.reader(number)
    z = reader.read(values)
    parts, whole = [reader.test(z, (part,)) for part in _ALL], reader.test(z, _ALL)
    level = math.log10(ALPHA)
    return {
        "least": min(one.statistic for one in parts),
        "parts": sum(one.log10_p <= level for one in parts),
        "whole": whole.statistic,
        "convicted": bool(whole.log10_p <= level),
        "owner": pipeline.statistic(chips, field.words[number]),
    }


def _lone(field: Field, number: int, attack: str) -> dict[str, Any]:
    suspect = field.subject.attacks[attack](field.copy(number))
    values = field.shifts(suspect)
    found = _member(field, field.chips(suspect), values, number)
    return {"attack": attack, **found, **_judged(field, suspect, values)}


def _joint(field: Field, size: int, mix: str, rebuilt: bool, seed: int) -> dict[str, Any]:
    suspect = field.copy(0)
    if size > 1:
        copies = aggregation.stack([field.copy(number) for number in range(size)])
        suspect = MIXES[mix](copies, jax.random.key(seed + size))
    if rebuilt and field.subject.rebuild:
        suspect = field.subject.rebuild(suspect)
    chips, values = field.chips(suspect), field.shifts(suspect)
    members = [_member(field, chips, values, number) for number in range(size)]
    return {
        "mix": mix,
        "size": size,
        "least": min(one["whole"] for one in members),
        "convicted": sum(one["convicted"] for one in members),
        "least_part": min(one["least"] for one in members),
        "by_parts": sum(one["parts"] == parties.NUM_PARTS for one in members),
        "owner": min(one["owner"] for one in members),
        **_judged(field, suspect, values),
    }


def show(console: rich.console.Console, result: sections.Result) -> None:
    bars = result["thresholds"]
    console.print(
        f"T at alpha = {result['alpha']:g}: {bars['eighth']:.2f} for an eighth of a secret word, {bars['whole']:.2f} "
        f"for all of it, {bars['owner']:.2f} for the owner's among a million customers; for readings of equal size"
    )
    for network in result["networks"]:
        _show_cost(console, network)
        _show_lone(console, network)
        for name in ("coalitions", "rebuilt"):
            _show_joint(console, network, name)


def _kept(row: dict[str, Any]) -> str:
    return f"{row['same']:.1%}" + (f", {row['accuracy']:.3f}" if row["accuracy"] is not None else "")


def _show_cost(console: rich.console.Console, network: dict[str, Any]) -> None:
    cost = network["cost"]
    table = rich.table.Table(
        *("copies with", "accuracy", "same answer", "logits' change", "KL [nats]", "the owner's T"),
        title=f"{network['network']}: {network['coordinates'] / parties.NUM_SEGMENTS:.1f} coordinates a choice; "
        f"strength {cost['strength']:.3g}; {cost['images']} images"
        + (f", base accuracy {cost['accuracy']:.4f}" if cost["accuracy"] is not None else ""),
        title_justify="left",
    )
    for name, rows in cost["rows"].items():
        mean = {key: np.mean([row[key] for row in rows]) for key in ("same", "change", "kl", "T")}
        accuracy = "" if cost["accuracy"] is None else f"{np.mean([row['accuracy'] for row in rows]):.4f}"
        share, change = f"{mean['same'] / cost['images']:.2%}", f"{mean['change']:.2%}"
        table.add_row(name, accuracy, share, change, f"{mean['kl']:.2g}", f"{mean['T']:.2f}")
    console.print(table)


def _show_lone(console: rich.console.Console, network: dict[str, Any]) -> None:
    table = rich.table.Table(
        *("attack", "least T, an eighth", "parts that convict", "least T, whole word", "the owner's T"),
        *("same answer, accuracy", "innocents: largest |T|", "convicted"),
        title=f"{network['network']}: lone leakers",
        title_justify="left",
    )
    for attack in dict.fromkeys(row["attack"] for row in network["lone"]):
        rows = [row for row in network["lone"] if row["attack"] == attack]
        table.add_row(
            attack,
            f"{min(row['least'] for row in rows):.1f}",
            f"{sum(row['parts'] for row in rows)} of {parties.NUM_PARTS * len(rows)}",
            f"{min(row['whole'] for row in rows):.1f}",
            f"{min(row['owner'] for row in rows):.1f}",
            _kept(min(rows, key=lambda row: row["same"])),
            f"{max(row['innocent'] for row in rows):.1f}",
            str(sum(row["wrong"] for row in rows)),
        )
    console.print(table)


def _show_joint(console: rich.console.Console, network: dict[str, Any], name: str) -> None:
    if not network[name]:
        return
    about = "coalitions" if name == "coalitions" else "averages after R0"
    table = rich.table.Table(
        *("attack", "members", "least T, whole word", "convicted", "least T, an eighth", "convicted by every eighth"),
        *("least owner's T", "same answer, accuracy", "innocents: largest |T|", "convicted"),
        title=f"{network['network']}: {about}",
        title_justify="left",
    )
    for row in network[name]:
        table.add_row(
            *(row["mix"], str(row["size"]), f"{row['least']:.1f}", f"{row['convicted']} of {row['size']}"),
            *(f"{row['least_part']:.1f}", f"{row['by_parts']} of {row['size']}", f"{row['owner']:.1f}"),
            *(_kept(row), f"{row['innocent']:.1f}", str(row["wrong"])),
        )
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    found = result["networks"]
    with sections.figure(path, 9, 2.8 * len(found)) as figure:
        for (left, right), network in zip(figure.subplots(len(found), 2, squeeze=False), found, strict=True):
            names = list(dict.fromkeys(row["attack"] for row in network["lone"]))
            for key, mark, label in (
                ("least", "o", "an eighth"),
                ("whole", "s", "whole word"),
                ("owner", "^", "owner's"),
            ):
                rows = network["lone"]
                left.plot([row[key] for row in rows], [names.index(row["attack"]) for row in rows], mark, label=label)
            left.axvline(result["thresholds"]["eighth"], color="0.4", lw=1)
            left.set(yticks=range(len(names)), yticklabels=names, xlabel="T", title=f"{network['network']}: one leaker")
            left.invert_yaxis()
            left.legend(frameon=False, fontsize=7)
            for mix in MIXES:
                rows = [row for row in network["coalitions"] if row["mix"] == mix]
                right.plot([row["size"] for row in rows], [row["least"] for row in rows], "o-", ms=4, label=mix)
            if network["rebuilt"]:
                sizes = [row["size"] for row in network["rebuilt"]]
                right.plot(sizes, [row["least"] for row in network["rebuilt"]], "s--", ms=4, label="average, R0")
            right.axhline(result["thresholds"]["whole"], color="0.4", lw=1)
            right.set_xticks(sorted({row["size"] for row in (*network["coalitions"], *network["rebuilt"])}))
            right.set(xlabel="colluders", ylabel="least T, whole word", title="coalitions")
            right.legend(frameon=False, fontsize=7)
