"""An owner who lies: random false bundles, signed with the owner's key, none of which may convict an innocent.

The owner has every key and every codeword, may lie in the commitment before publishing its root, and again in the
bundle, which is signed anew. The statistics stated are those that an arbiter will compute. The codewords are honest: an
owner who commits to a customer's word and marks a model with it frames that customer, which no bundle can show.

Each case is verified as an arbiter would, with the roots that were published. A bundle that holds and accuses somebody
whose copy the suspect is not is a false conviction. Every hundredth case is the true bundle, which must hold. The same
cases with the range checks off are the control: they must convict, or the lies are no test.

The result is accusations.json in the output folder; the exit code is 1 when any case failed.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import hashlib
import itertools
import json
import multiprocessing
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from smark_jax import errors, keys
from smark_jax.vault import bundles, commitments, documents, evidence, merkle, ranges, verification
from stress.fuzz import evidence as stage

_CASES = {"quick": 300, "full": 10_000}
_SECONDS_PER_CASE = 20.0
_TRUE_EVERY = 100
_SIZES = (0, 1, 2, 3, 8, 63, 64, 2**31, 2**62)
_REALS = (-1e300, -1.0, 0.0, 1e-300, 1e-6, 0.011, 0.5, 0.9, 1.0, 2.0, 17.4, 1e300)
_EXAMPLES = """examples:
  PYTHONPATH=tests python -m stress.fuzz.accusations
  PYTHONPATH=tests python -m stress.fuzz.accusations --config full --out tests/stress/results
"""

Lie = Callable[[dict[str, Any], np.random.Generator], None]


class Case(NamedTuple):
    """What reaches the arbiter: the bundle's file, the model in dispute, and the roots that were published."""

    content: bytes
    suspect: stage.Suspect
    roots: tuple[str, ...]
    lies: tuple[str, ...]


# Lies before the root is published: what they change is committed to.


def alpha(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["commitment"]["header"]["alpha"] = _one(rng, (0.0, 0.01, 0.1, 0.5, 0.99, 1.0, 2.0, 1e6))


def any_number_in_the_header(content: dict[str, Any], rng: np.random.Generator) -> None:
    header = content["commitment"]["header"]
    header[_one(rng, ("decoder_version", "number"))] = _one(rng, _SIZES)
    header["strength"] = _one(rng, _REALS)


def fewer_customers(content: dict[str, Any], rng: np.random.Generator) -> None:
    """A tree of fewer customers than there are, or a header that counts others than its tree has."""
    content["commitment"]["header"]["customers"] = _one(rng, (0, 1, 2, 4, 6, 2**62))
    content["num_customers"] = _one(rng, (1, 5))
    content["later"] = []


def other_chips(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["commitment"]["header"]["num_chips"] = _one(rng, (0, 1, 8, 2**40))


def leaves_and_scales(content: dict[str, Any], rng: np.random.Generator) -> None:
    place, (path, shape, scale) = _one(rng, list(enumerate(content["spec"])))
    other = ([path, shape, -scale], [path, shape, 0.0], [path, shape, 1.5 * scale], ["third", shape, scale])
    content["spec"][place] = _one(rng, (*other, [path, [*shape, 0], scale], [path, [2**40] * 2, scale]))


def fewer_leaves(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["spec"] = content["spec"][: int(rng.integers(3))]


def carrier(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["carrier_key"] = rng.bytes(32).hex()


# Lies in the bundle, which is signed afterwards.


def counters(content: dict[str, Any], rng: np.random.Generator) -> None:
    content[_one(rng, ("num_suspects", "num_alignments", "num_customers"))] = _one(rng, _SIZES)
    content["verdict"][_one(rng, ("number", "occasion"))] = _one(rng, _SIZES)


def claims(content: dict[str, Any], rng: np.random.Generator) -> None:
    claim = _one(rng, content["accused"])
    claim[_one(rng, ("statistic", "log10_p", "share"))] = _one(rng, _REALS)


def supports(content: dict[str, Any], rng: np.random.Generator) -> None:
    """Own, repeated, unopened and absurdly many words."""
    claim = _one(rng, content["accused"])
    claim["support"] = rng.integers(0, 6, int(_one(rng, (1, 2, 4, 70, 3000)))).tolist()


def accused_twice(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["accused"] = content["accused"] * int(_one(rng, (0, 2, 500)))


def exchanged_words(content: dict[str, Any], rng: np.random.Generator) -> None:
    """The words, names, salts, serials, places or paths of two opened leaves."""
    one, other = _one(rng, content["opened"]), _one(rng, content["opened"])
    name = _one(rng, ("word", "customer", "salt", "serial", "index", "path", "commitment"))
    one, other = (one["leaf"], other["leaf"]) if name in one["leaf"] else (one, other)
    one[name], other[name] = other[name], one[name]


def fitted_word(content: dict[str, Any], rng: np.random.Generator) -> None:
    """A word chosen after the fact: the signs that the suspect reads."""
    leaf = _one(rng, content["opened"])["leaf"]
    suspect = _one(rng, stage.scene().suspects)
    leaf["word"] = np.packbits(suspect.chips < 0).tobytes().hex()


def layout(content: dict[str, Any], rng: np.random.Generator) -> None:
    """Which leaf is which, where three have one shape."""
    names = ["first", "second", "third"]
    content["suspect"]["reading"]["given"] = dict(zip(names, rng.permutation(names).tolist(), strict=True))


def reading(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["suspect"]["reading"].update(rectify=bool(rng.integers(2)), align=_one(rng, (None, None, "a:b", "")))


def chain(content: dict[str, Any], rng: np.random.Generator) -> None:
    """Commitments left out, doubled, exchanged, or of another model."""
    first, later = {name: content[name] for name in ("commitment", "timestamps")}, content["later"]
    found = _one(rng, ([], later * 2, [first, *later], later[::-1], [first] * 50))
    content["later"] = copy.deepcopy(found)
    if found and rng.integers(2):
        header = content["later"][-1]["commitment"]["header"]
        header[_one(rng, ("model", "previous", "base"))] = "11" * 32


def stamps(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["timestamps"] = [{"time": "2020-01-01T00:00:00Z", "response": rng.bytes(40).hex()}] * int(
        _one(rng, (1, 3, 1000))
    )


def another_suspect(content: dict[str, Any], rng: np.random.Generator) -> None:
    content["suspect"]["content"] = _one(rng, stage.scene().suspects).content


def any_value(content: dict[str, Any], rng: np.random.Generator) -> None:
    """Any field, replaced by another value of its kind."""
    parent, name = stage.place(content, rng, int(rng.integers(1, 6)))
    kinds: dict[type, Sequence[Any]] = {int: _SIZES, float: _REALS, bool: (False, True)}
    parent[name] = _one(rng, kinds.get(type(parent[name]), (parent[name], "00" * 32, "", "Ada", "\x1b[2J")))


BEFORE: tuple[Lie, ...] = (
    alpha, alpha, alpha, alpha, any_number_in_the_header, fewer_customers, other_chips, leaves_and_scales,
    fewer_leaves, carrier,
)  # fmt: skip
AFTER: tuple[Lie, ...] = (
    counters, claims, supports, accused_twice, exchanged_words, fitted_word, layout, reading, chain, stamps,
    another_suspect, any_value, any_value, leaves_and_scales, fewer_leaves, carrier, alpha,
)  # fmt: skip


def forge(seed: int, number: int) -> Case:
    """The case of a number: the true bundle, or an accusation of whom the owner likes, with some lies."""
    at, rng = stage.scene(), np.random.default_rng([seed, number])
    if number % _TRUE_EVERY == 0:
        return Case(at.bundle, at.suspects[0], at.roots[:1], ())
    suspect = _one(rng, at.suspects)
    content = json.loads(at.bundle)["bundle"]
    content["suspect"]["content"] = suspect.content
    before = [_one(rng, BEFORE)] * (rng.random() < 0.4)
    after = [_one(rng, AFTER) for _ in range(int(rng.integers(0, 3)))]
    for lie in before:
        lie(content, rng)
    commit(content)
    roots = tuple(item["commitment"]["root"] for item in committed(content))
    accuse(content, suspect, rng)
    for lie in after:
        with contextlib.suppress(
            LookupError, TypeError, AttributeError, ValueError
        ):  # an earlier lie left nothing to change
            lie(content, rng)
    signer = at.master if rng.random() < 0.95 else keys.from_bytes(rng.bytes(32))
    names = tuple(lie.__name__ for lie in (*before, *after)) or ("no lie but the accusation",)
    return Case(bundles.signed(content, signer), suspect, roots, names)


def commit(content: dict[str, Any]) -> None:
    """Makes the commitments anew, as the content and its first header now are, over true leaves; opens all of them."""
    leaves, shared, content["opened"] = stage.scene().leaves, content["commitment"]["header"], []
    shared["spec"] = hashlib.sha256(documents.canonical(content["spec"])).hexdigest()
    shared["carrier_key"] = keys.commitment(keys.from_bytes(bytes.fromhex(content["carrier_key"])))
    previous = shared["previous"]
    for item in committed(content):
        tree = item["commitment"]
        own = {name: tree["header"][name] for name in ("created", "customers", "number")}
        tree["header"] = {**shared, **own, "previous": previous}
        covered = leaves[: own["customers"]]
        hashed = [_hashed("header", tree["header"]), *(_hashed("customer", leaf) for leaf in covered)]
        previous = tree["root"] = merkle.root(hashed).hex()
        tree["header_path"], *paths = [
            [node.hex() for node in path] for path in merkle.paths(hashed, range(len(hashed)))
        ]
        for index in range(len(content["opened"]) + 1, len(covered) + 1):
            leaf = copy.deepcopy(covered[index - 1])
            opened = {"leaf": leaf, "commitment": own["number"], "index": index, "path": paths[index - 1]}
            content["opened"].append(opened)


def committed(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A bundle's commitments with their time stamps, in JSON."""
    return [{name: content[name] for name in ("commitment", "timestamps")}, *content["later"]]


def _hashed(kind: str, leaf: dict[str, Any]) -> bytes:
    """A leaf of a commitment's tree, whatever stands in it."""
    return merkle.leaf_hash(f"{kind} ".encode() + documents.canonical(leaf))


def accuse(content: dict[str, Any], suspect: stage.Suspect, rng: np.random.Generator) -> None:
    """Accuses one to three customers, with supports, and states what an arbiter will compute."""
    leaves = [opened["leaf"] for opened in content["opened"]]
    words = {
        leaf["serial"]: commitments.word(documents.parse(documents.Leaf, leaf), len(suspect.chips)) for leaf in leaves
    }
    content["accused"] = []
    for serial in rng.permutation(list(words))[: int(rng.integers(1, 4))].tolist():
        others = [other for other in words if other != serial]
        support = rng.permutation(others)[: int(rng.integers(0, 3))].tolist()
        rest = [words[other] for other in support]
        counts = evidence.Counts(content["num_customers"], content["num_suspects"], content["num_alignments"])
        found = evidence.test(suspect.chips, words[serial], rest, counts)
        content["accused"].append({"serial": serial, "support": support, "share": 0.5, **found._asdict()})


def _one(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    if not choices:
        raise LookupError("nothing to choose from")
    return choices[int(rng.integers(len(choices)))]


# The arbiter.


def verdict(case: Case, path: Path) -> str:
    """How verification ends: "refused", "fails", "true", or "FALSE" for the conviction of an innocent."""
    path.write_bytes(case.content)
    try:
        report = verification.verify(path, case.suspect.path, stage.scene().base, root=case.roots)
    except errors.Unreadable:
        return "refused"
    if not report.holds:
        return "fails"
    named = {(accused.serial, accused.customer) for accused in report.accused}
    guilty = {pair for pair in enumerate(stage.NAMES) if pair[1] in case.suspect.guilty}
    return "true" if named and named <= guilty else "FALSE"


@contextlib.contextmanager
def ranges_unchecked() -> Iterator[None]:
    """The control: as if no number of a bundle were checked."""
    unchecked = lambda *_: None  # noqa: E731
    with mock.patch.multiple(ranges, level=unchecked, numbers=unchecked):
        yield


def fuzz(seed: int, first: int, last: int) -> dict[str, Any]:
    """What a seed's cases came to: how each ended, false convictions, tracebacks, the slowest, and the control."""
    ends: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    control, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bundle")
        for number in range(first, last):
            case = forge(seed, number)
            start = time.process_time()
            try:
                with _no_longer_than(_SECONDS_PER_CASE):
                    end = verdict(case, path)
            except Exception:
                end = "error"
                failures.append({"case": number, "lies": case.lies, "what": traceback.format_exc(limit=-4)})
            slowest = max(slowest, time.process_time() - start)
            if end == "FALSE" or (not case.lies and end != "true"):
                failures.append({"case": number, "lies": case.lies, "what": f"it ended as {end}"})
            for lie in case.lies or ("the true bundle",):
                ends[f"{lie}: {end}"] += 1
            with ranges_unchecked(), contextlib.suppress(Exception):
                control += alpha.__name__ in case.lies and verdict(case, path) == "FALSE"
    return {
        "cases": last - first,
        "failures": failures,
        "false_convictions_without_range_checks": control,
        "slowest_processor_seconds": round(slowest, 2),
        "ends": dict(sorted(ends.items())),
    }


@contextlib.contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """Of processor time, so that a busy machine is no hang."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds:g} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of several processes as one."""
    ends = sum((collections.Counter(part["ends"]) for part in parts), collections.Counter())
    added = ("cases", "failures", "false_convictions_without_range_checks")
    return {
        **{name: sum((part[name] for part in parts), type(parts[0][name])()) for name in added},
        "slowest_processor_seconds": max(part["slowest_processor_seconds"] for part in parts),
        "ends": dict(sorted(ends.items())),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stress.fuzz.accusations",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", choices=tuple(_CASES), default="quick", help="quick: 300 cases; full: 10,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the result (default: out/fuzz/CONFIG)")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cases")
    options = parser.parse_args(arguments)
    cases, began = _CASES[options.config], time.perf_counter()
    edges = [cases * worker // options.workers for worker in range(options.workers + 1)]
    with concurrent.futures.ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(fuzz, options.seed, *some) for some in itertools.pairwise(edges)]
        result = together([job.result() for job in jobs])
    result |= {"seed": options.seed, "seconds": round(time.perf_counter() - began, 1)}
    out = options.out or Path("out") / "fuzz" / options.config
    out.mkdir(parents=True, exist_ok=True)
    (out / "accusations.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['cases']:,} bundles, {len(result['failures']):,} failed, slowest "
        f"{result['slowest_processor_seconds']:g} s of processor time; "
        f"without range checks {result['false_convictions_without_range_checks']:,} false convictions"
    )
    for failure in result["failures"][:5]:
        print(f"case {failure['case']} ({', '.join(failure['lies'])}): {failure['what']}")
    return 1 if result["failures"] or not result["false_convictions_without_range_checks"] else 0


if __name__ == "__main__":
    sys.exit(main())
