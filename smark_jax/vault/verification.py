"""What an arbiter does with a bundle: compute everything again, from the suspect, the base and the published root."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _validate, carriers, errors, files, keys
from smark_jax.vault import bundles, commitments, evidence, merkle, models, ranges, timestamps, verdicts

# How far a statistic may differ between the owner's computer and the arbiter's, and a leaf's spread.
_ROUNDING = 1e-2
# What may differ between two commitments to a model.
_PASSING = ("created", "customers", "number", "previous")
# Nothing is computed from a suspect unless all of these hold.
_BEFORE_READING = ("level", "numbers", "commitment", "base", "carrier", "carrying leaves", "customers")


class Check(NamedTuple):
    """One thing that was checked: what it is, whether it holds, and more about it in words."""

    name: str
    holds: bool
    detail: str


class Report(NamedTuple):
    """What an arbiter found.

    Attributes:
      checks: in the order in which they were made.
      accused: name, serial, statistic and p-value (as logarithm to base 10) of each accused, as computed here.
      header: of the commitment, the oldest where codewords were committed to one after another.
      root: of that commitment.
      compared: whether the codewords were compared with published roots.
      statements: what the arbiter has the owner's word for.
      num_customers: for which p-values are corrected.
      largest_alpha: up to which the arbiter accepts a committed level.
    """

    checks: tuple[Check, ...]
    accused: tuple[dict[str, Any], ...]
    header: dict[str, Any]
    root: str
    compared: bool
    statements: tuple[str, ...]
    num_customers: int
    largest_alpha: float

    @property
    def holds(self) -> bool:
        """Whether everything that was checked holds."""
        return all(check.holds for check in self.checks)


class _Fails(Exception):
    """A check that does not hold; the text says why."""


class _Checks(list[Check]):
    """The checks made so far."""

    @contextlib.contextmanager
    def check(self, name: str, detail: str) -> Iterator[list[str]]:
        """Adds one, which holds unless the block raises :class:`_Fails`; the block may add to the details."""
        details = [detail]
        try:
            yield details
        except _Fails as error:
            self.append(Check(name, False, str(error)))
        else:
            self.append(Check(name, True, ", ".join(details)))


def published_root(source: str) -> str:
    """The root in a commitment's file, or given itself in hexadecimal.

    Raises:
      SmarkError: when it is neither.
    """
    if re.fullmatch("[0-9a-fA-F]{64}", source):
        return source.lower()
    if not Path(source).is_file():
        cause = "Name the file that the owner published, or give the root itself."
        raise _validate.fail("evidence", "a commitment's file or a root of 64 hexadecimal digits", repr(source), cause)
    return bundles.read_json(Path(source), bundles.COMMITMENT, "a commitment")["root"]


def verify(
    bundle: Path,
    suspect: Path,
    base: Path,
    *,
    root: str | Sequence[str] | None = None,
    largest_alpha: float = ranges.LARGEST_ALPHA,
    aligner: verdicts.Aligner | None = None,
    on_step: Callable[[str], None] = lambda text: None,
) -> Report:
    """Verifies a bundle without a vault: hashes, paths, the carrier, every accusation.

    Args:
      bundle: the evidence.
      suspect: the model in dispute.
      base: the model that copies were made from.
      root: that was published before the sale, in hex; several where customers were licensed one after another.
      largest_alpha: the highest committed level that the arbiter accepts.
      aligner: how to align, where the owner did; the arbiter's own copy of the network.
      on_step: called with what is done next.

    Raises:
      SmarkError: when a file cannot be read at all, or ``largest_alpha`` is no level.
    """
    _validate.probability("evidence", "the largest alpha", largest_alpha)
    content, signature = bundles.read(bundle)
    header, roots = content["commitment"]["header"], (root,) if isinstance(root, str) else tuple(root or ())
    on_step("reading the models")
    theirs, ours = files.read(suspect, strict=False), files.read(base)
    checks, accused = _Checks(), []
    with checks.check("signature", f"by the owner's key {header['public_key'][:16]}..., which the commitment names"):
        _require(bundles.genuine(content, signature), "the bundle was changed after it was signed")
    with checks.check("level", f"alpha {header['alpha']:g}, of at most {largest_alpha:g} that you accept"):
        _refuse(ranges.level(content, largest_alpha))
    with checks.check("numbers", "each is in its range"):
        _refuse(ranges.numbers(content))
    _check_commitments(checks, content, roots)
    found = _check_contents(checks, content, theirs.leaves, ours.leaves)
    if found is not None:
        on_step("reading the suspect's chips")
        spec, words, key = found
        read = None
        with checks.check("read-out", "the suspect read as the owner read it") as detail:
            read = _read(content, theirs.leaves, ours.leaves, spec, key, aligner)
            detail.append(f"{read.coverage.read:,} of {read.coverage.weights:,} carrying weights")
            _refuse(_misstated(content, read))
        if read is not None and read.log_maps:
            checks.append(Check("map of leaves", True, verdicts.maps_in_words(read.log_maps)))
        if read is not None:
            accused = [_judge(checks, content, claim, read, words) for claim in content["accused"]]
    return Report(
        checks=tuple(checks),
        accused=tuple(accused),
        header=header,
        root=content["commitment"]["root"],
        compared=bool(roots),
        statements=_statements(content),
        num_customers=bundles.num_customers(content),
        largest_alpha=largest_alpha,
    )


def _check_commitments(checks: _Checks, content: dict[str, Any], roots: Sequence[str]) -> None:
    """The chain of commitments, their time stamps, and the roots that were published."""
    chain = bundles.chain(content)
    for before, item in zip([None, *chain], chain, strict=False):
        tree = item["commitment"]
        detail = f"number {tree['header']['number']} to {tree['header']['model']}, root {tree['root']}"
        with checks.check("commitment", detail):
            _check_commitment(tree, before and before["commitment"])
        for stamp in item["timestamps"]:
            detail = f"{stamp['time']}; check the authority's signature with 'openssl ts -verify'"
            with checks.check("time stamp", detail):
                _require(_stamped(tree, stamp), "it is about another commitment, or states another time")
    if roots:
        with checks.check("published root", "the same as the commitment's"):
            _check_published(content, roots)


def _check_contents(
    checks: _Checks, content: dict[str, Any], suspect: dict[str, np.ndarray], base: dict[str, np.ndarray]
) -> tuple[carriers.Spec, dict[int, np.ndarray], keys.SecretKey] | None:
    """Models, carrier, leaves and codewords against the commitment; None when the suspect cannot be read by them."""
    header = content["commitment"]["header"]
    key = keys.from_bytes(bytes.fromhex(content["carrier_key"]))
    spec, words = None, {}
    with checks.check("base", f"content hash {header['base']}"):
        _require(files.content_hash(base) == header["base"], "it is not the model that was committed to")
    with checks.check("suspect", f"content hash {content['suspect']['content']}"):
        same = files.content_hash(suspect) == content["suspect"]["content"]
        _require(same, "it is not the model that was accused")
    with checks.check("carrier", "its key is the one that was committed to"):
        _require(keys.commitment(key) == header["carrier_key"], "its key was not committed to: it is forged")
    with checks.check("carrying leaves", f"{len(content['spec'])} leaves, as committed to, and as the base has them"):
        spec = _spec(content, base)
    with checks.check("customers", f"{len(content['opened'])} of {header['customers']:,} opened, each under the root"):
        words = _words(content)
    if spec is None or not all(check.holds for check in checks if check.name in _BEFORE_READING):
        return None
    return spec, words, key


def _check_commitment(tree: dict[str, Any], before: dict[str, Any] | None) -> None:
    """That the header leads to the root, and that the commitment follows the one before."""
    header, path = tree["header"], [bytes.fromhex(node) for node in tree["header_path"]]
    found = merkle.root_of_path(commitments.header_leaf(header), 0, header["customers"] + 1, path)
    _require(found == bytes.fromhex(tree["root"]), "the header does not lead to the root")
    if before is not None:
        follows = (header["previous"], header["number"]) == (before["root"], before["header"]["number"] + 1)
        _require(follows, f"it does not name the commitment of number {before['header']['number']} as the one before")
        other = [name for name in header if name not in _PASSING and header[name] != before["header"][name]]
        _require(not other, f"it is not to the same model: {', '.join(other)}")
        _require(header["customers"] > before["header"]["customers"], "it has no more customers than the one before")


def _check_published(content: dict[str, Any], roots: Sequence[str]) -> None:
    """That all published roots are the bundle's, and that every opened codeword is under one of them or an earlier."""
    numbers = {item["commitment"]["root"]: item["commitment"]["header"]["number"] for item in bundles.chain(content)}
    for root in roots:
        _require(root in numbers, f"{root} was published: keys or customers were chosen afterwards")
    newest = max(numbers[root] for root in roots)
    for opened in content["opened"]:
        number = bundles.proved_by(content, opened)
        customer = opened["leaf"]["customer"]
        _require(number <= newest, f"the root of commitment {number}, with the codeword of {customer!r}, was not given")


def _judge(
    checks: _Checks, content: dict[str, Any], claim: dict[str, Any], read: verdicts.Read, words: dict[int, np.ndarray]
) -> dict[str, Any]:
    """One accusation, computed again."""
    name = next(o["leaf"]["customer"] for o in content["opened"] if o["leaf"]["serial"] == claim["serial"])
    alpha, customers = content["commitment"]["header"]["alpha"], bundles.num_customers(content)
    found, apart = (
        evidence.test(
            read.chips,
            words[claim["serial"]],
            [words[serial] for serial in claim["support"]],
            num_customers=customers,
            num_suspects=content["num_suspects"],
            num_alignments=content["num_alignments"],
            log_maps=read.log_maps,
            base=base,
        )
        for base in (None, read.nothing)
    )
    rest = f", with {len(claim['support'])} others' parts taken out" if claim["support"] else ""
    level = f"p <= 10^{found.log10_p:.1f} at alpha = {alpha:g}, counting {customers:,} customers"
    detail = f"T = {found.statistic:.2f}, {level}{rest}"
    with checks.check(f"accusation of {name!r}", detail):
        _require(found.log10_p <= math.log10(alpha), f"not significant: {detail}")
        close = abs(found.statistic - claim["statistic"]) <= _ROUNDING * max(1.0, abs(claim["statistic"]))
        # Before read-outs were numbered, shifts had no bound: T may differ then, and what is found here counts.
        close |= "readout" not in content["suspect"]["reading"]
        _require(close, f"T is {found.statistic:.2f} here and {claim['statistic']:.2f} in the bundle")
        # Zeros in the suspect's place read as the base alone does: what it shares with that speaks for nobody.
        lost = f"the base alone reads as this codeword (T is {apart.statistic:.2f} without what it adds)"
        _require(apart.log10_p <= math.log10(alpha), lost)
    return {"customer": name, "serial": claim["serial"], **found._asdict()}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Fails(otherwise)


def _refuse(wrong: str | None) -> None:
    _require(wrong is None, wrong or "")


def _stamped(tree: dict[str, Any], stamp: dict[str, Any]) -> bool:
    published = commitments.Commitment.of(tree).published
    try:
        return timestamps.check(published, bytes.fromhex(stamp["response"])) == stamp["time"]
    except errors.MissingExtra:
        raise
    except errors.SmarkError:
        return False


def _spec(content: dict[str, Any], base: dict[str, np.ndarray]) -> carriers.Spec:
    """The carrying leaves, when they were committed to and are the base's."""
    spec, header = models.spec_from(content["spec"]), content["commitment"]["header"]
    _require(models.spec_digest(spec) == header["spec"], "others were committed to")
    for leaf, claimed in zip(spec.leaves, spec.scales, strict=True):
        there = base.get(leaf.path)
        _require(there is not None and there.shape == leaf.shape, f"the base has no leaf {leaf.path!r} of that shape")
        scale = float(np.sqrt(np.mean(np.square(np.asarray(there, np.float64)))))
        _require(abs(scale - float(claimed)) <= _ROUNDING * scale, f"the base's {leaf.path!r} is of another size")
    _require(len({leaf.path for leaf in spec.leaves}) == len(spec.leaves) > 0, "one is named twice, or none at all")
    _require(0 < header["num_chips"] <= spec.num_weights, "there are more chips than weights")
    return spec


def _words(content: dict[str, Any]) -> dict[int, np.ndarray]:
    """The opened codewords by serial, when each is under its root and each accusation has the words it needs."""
    trees = {item["commitment"]["header"]["number"]: item["commitment"] for item in bundles.chain(content)}
    num_chips = content["commitment"]["header"]["num_chips"]
    words = {}
    for opened in content["opened"]:
        leaf, path = opened["leaf"], [bytes.fromhex(node) for node in opened["path"]]
        number = bundles.proved_by(content, opened)
        _require(number in trees, f"the commitment with the leaf of {leaf['customer']!r} is not in the bundle")
        tree = trees[number]
        found = merkle.root_of_path(commitments.leaf(leaf), opened["index"], tree["header"]["customers"] + 1, path)
        there = found == bytes.fromhex(tree["root"])
        _require(there, f"the leaf of {leaf['customer']!r} is not under the root: it is another one")
        _require(len(leaf["word"]) == 2 * -(-num_chips // 8), "a codeword is of another length")
        words[leaf["serial"]] = commitments.word(leaf, num_chips)
    _require(len(words) == len(content["opened"]), "a serial was opened twice")
    serials = [claim["serial"] for claim in content["accused"]]
    _require(0 < len(serials) == len(set(serials)), "nobody is accused, or somebody twice")
    for claim in content["accused"]:
        used = [claim["serial"], *claim["support"]]
        _require(words.keys() >= set(used) and len(set(used)) == len(used), "an accusation uses words not opened")
    return words


def _read(
    content: dict[str, Any],
    suspect: dict[str, np.ndarray],
    base: dict[str, np.ndarray],
    spec: carriers.Spec,
    key: keys.SecretKey,
    aligner: verdicts.Aligner | None,
) -> verdicts.Read:
    how = content["suspect"]["reading"]
    if how["align"] and not aligner:
        raise _Fails(f"the owner aligned it by {how['align']}: pass --align with your own copy of that function")
    reading = verdicts.Reading(aligner if how["align"] else None, how["rectify"], how["given"])
    try:
        mark = carriers.Mark(spec, carriers.draw(key, spec, content["commitment"]["header"]["num_chips"]))
        return verdicts.read(suspect, base, mark, reading, control=True)
    except errors.SmarkError as error:
        raise _Fails(error.desk) from None


def _misstated(content: dict[str, Any], read: verdicts.Read) -> str | None:
    """What the bundle says of the reading that is not so; None when all is, or an older version wrote it."""
    suspect = content["suspect"]
    if "readout" not in suspect["reading"]:
        return None
    if suspect["layout"] != [move._asdict() for move in read.layout]:
        return "the bundle states another layout than is found here"
    if suspect.get("left_out", []) != [left._asdict() for left in read.coverage.left_out]:
        return f"the bundle states that other weights were left out than here, where {read.coverage}"
    return None


def _statements(content: dict[str, Any]) -> tuple[str, ...]:
    suspects, readings = content["num_suspects"], content["num_alignments"]
    occasion = content["verdict"]["occasion"]
    customers = bundles.num_customers(content)
    stamped = all(item["timestamps"] for item in bundles.chain(content))
    age = "the time stamps say how old that is" if stamped else "no time stamp says how old that is"
    return (
        f"that {suspects} suspect(s) were examined together, in {readings} reading(s) each: p-values count them",
        f"that it was occasion {occasion} of tracing this model: alpha holds for each occasion",
        f"that the suspect was compared with no more than {customers:,} customers: p-values count them",
        "that codewords were drawn at random, and neither chosen nor drawn again until one fitted",
        "that the base was made without a look at codewords, and is what copies were made from",
        "that there is no other commitment to this model with other codewords, published to be shown where it fits",
        f"that the suspect is younger than the commitment: {age}, and nothing here says how old the suspect is",
        "that no copy with this codeword was made for anybody but the accused",
    )
