"""What an arbiter does with a bundle: compute everything again, from the suspect, the base and the published root."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _validate, carriers, files, keys
from smark_jax.vault import bundles, commitments, evidence, merkle, models, timestamps, verdicts

# How far a statistic may differ between the owner's computer and the arbiter's, and a leaf's spread.
_ROUNDING = 1e-2


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
      header: of the commitment.
      root: of the commitment.
      compared: whether the root was compared with a published one.
      statements: what the arbiter has the owner's word for.
    """

    checks: tuple[Check, ...]
    accused: tuple[dict[str, Any], ...]
    header: dict[str, Any]
    root: str
    compared: bool
    statements: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether everything that was checked holds."""
        return all(check.holds for check in self.checks)


class _Fails(Exception):
    """A check that does not hold; the text says why."""


def published_root(source: str) -> str:
    """The root in a commitment's file, or given itself in hexadecimal.

    Raises:
      ValueError: when it is neither.
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
    root: str | None = None,
    aligner: verdicts.Aligner | None = None,
    on_step: Callable[[str], None] = lambda text: None,
) -> Report:
    """Verifies a bundle without a vault: hashes, paths, the carrier, every accusation.

    Args:
      bundle: the evidence.
      suspect: the model in dispute.
      base: the model that copies were made from.
      root: that was published before the sale, in hex.
      aligner: how to align, where the owner did; the arbiter's own copy of the network.
      on_step: called with what is done next.

    Raises:
      ValueError: when a file cannot be read at all.
    """
    content, signature = bundles.read(bundle)
    header, tree = content["commitment"]["header"], content["commitment"]
    on_step("reading the models")
    theirs, ours = files.read(suspect, strict=False), files.read(base)
    checks: list[Check] = []

    @contextlib.contextmanager
    def check(name: str, detail: str) -> Iterator[None]:
        try:
            yield
        except _Fails as error:
            checks.append(Check(name, False, str(error)))
        else:
            checks.append(Check(name, True, detail))

    with check("signature", f"by the owner's key {header['public_key'][:16]}..., which the commitment names"):
        _require(bundles.genuine(content, signature), "the bundle was changed after it was signed")
    with check("commitment", f"number {header['number']} to {header['model']}, root {tree['root']}"):
        leaf, path = commitments.header_leaf(header), [bytes.fromhex(node) for node in tree["header_path"]]
        found = merkle.root_of_path(leaf, 0, header["customers"] + 1, path)
        _require(found == bytes.fromhex(tree["root"]), "the header does not lead to the root")
    if root is not None:
        with check("published root", "the same as the commitment's"):
            _require(root == tree["root"], f"{root} was published: keys or customers were chosen afterwards")
    for stamp in content["timestamps"]:
        detail = f"{stamp['time']}; check the authority's signature with 'openssl ts -verify'"
        with check("time stamp", detail):
            _require(_stamped(tree, stamp), "it is about another commitment, or states another time")
    with check("base", f"content hash {header['base']}"):
        _require(files.content_hash(ours.leaves) == header["base"], "it is not the model that was committed to")
    with check("suspect", f"content hash {content['suspect']['content']}"):
        same = files.content_hash(theirs.leaves) == content["suspect"]["content"]
        _require(same, "it is not the model that was accused")
    with check("carrier", "its key is the one that was committed to"):
        key = keys.from_bytes(bytes.fromhex(content["carrier_key"]))
        _require(keys.commitment(key) == header["carrier_key"], "its key was not committed to: it is forged")
    spec = None
    with check("carrying leaves", f"{len(content['spec'])} leaves, as committed to, and as the base has them"):
        spec = _spec(content, ours.leaves)
    with check("customers", f"{len(content['opened'])} of {header['customers']:,} opened, each under the root"):
        words = _words(content)
    if (
        not all(c.holds for c in checks if c.name in ("carrying leaves", "customers", "carrier", "base"))
        or spec is None
    ):
        return Report(tuple(checks), (), header, tree["root"], root is not None, _statements(content))
    on_step("reading the suspect's chips")
    accused = []
    read = None
    with check("read-out", "the suspect read as the owner read it"):
        read = _chips(content, theirs.leaves, ours.leaves, spec, key, aligner)
    if read is not None and read.log_maps:
        checks.append(Check("map of leaves", True, verdicts.maps_in_words(read.log_maps)))
    for claim in content["accused"] if read is not None else ():
        name = next(o["leaf"]["customer"] for o in content["opened"] if o["leaf"]["serial"] == claim["serial"])
        found = evidence.test(
            read.chips,
            words[claim["serial"]],
            [words[serial] for serial in claim["support"]],
            num_customers=header["customers"],
            num_suspects=content["num_suspects"],
            num_alignments=content["num_alignments"],
            log_maps=read.log_maps,
        )
        rest = f", with {len(claim['support'])} others' parts taken out" if claim["support"] else ""
        detail = f"T = {found.statistic:.2f}, p <= 10^{found.log10_p:.1f} at alpha = {header['alpha']:g}{rest}"
        with check(f"accusation of {name!r}", detail):
            _require(found.log10_p <= math.log10(header["alpha"]), f"not significant: {detail}")
            close = abs(found.statistic - claim["statistic"]) <= _ROUNDING * max(1.0, abs(claim["statistic"]))
            # Before read-outs were numbered, shifts had no bound: T may differ then, and what is found here counts.
            close |= "readout" not in content["suspect"]["reading"]
            _require(close, f"T is {found.statistic:.2f} here and {claim['statistic']:.2f} in the bundle")
        accused.append({"customer": name, "serial": claim["serial"], **found._asdict()})
    return Report(tuple(checks), tuple(accused), header, tree["root"], root is not None, _statements(content))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Fails(otherwise)


def _stamped(tree: dict[str, Any], stamp: dict[str, Any]) -> bool:
    published = commitments.Commitment.of(tree).published
    try:
        return timestamps.check(published, bytes.fromhex(stamp["response"])) == stamp["time"]
    except ValueError:
        return False


def _spec(content: dict[str, Any], base: dict[str, np.ndarray]) -> carriers.Spec:
    """The carrying leaves, when they were committed to and are the base's."""
    spec, header = models.spec_from(content["spec"]), content["commitment"]["header"]
    _require(models.spec_digest(spec) == header["spec"], "others were committed to")
    for leaf in spec.leaves:
        there = base.get(leaf.path)
        _require(there is not None and there.shape == leaf.shape, f"the base has no leaf {leaf.path!r} of that shape")
        scale = float(np.sqrt(np.mean(np.square(np.asarray(there, np.float64)))))
        _require(abs(scale - leaf.scale) <= _ROUNDING * scale, f"the base's {leaf.path!r} is of another size")
    _require(len({leaf.path for leaf in spec.leaves}) == len(spec.leaves) > 0, "one is named twice, or none at all")
    _require(0 < header["num_chips"] <= spec.num_weights, "there are more chips than weights")
    return spec


def _words(content: dict[str, Any]) -> dict[int, np.ndarray]:
    """The opened codewords by serial, when each is under the root and each accusation has the words it needs."""
    header, root = content["commitment"]["header"], bytes.fromhex(content["commitment"]["root"])
    words = {}
    for opened in content["opened"]:
        leaf, path = opened["leaf"], [bytes.fromhex(node) for node in opened["path"]]
        found = merkle.root_of_path(commitments.leaf(leaf), opened["index"], header["customers"] + 1, path)
        _require(found == root, f"the leaf of {leaf['customer']!r} is not under the root: it is another one")
        _require(len(leaf["word"]) == 2 * -(-header["num_chips"] // 8), "a codeword is of another length")
        words[leaf["serial"]] = commitments.word(leaf, header["num_chips"])
    _require(len(words) == len(content["opened"]), "a serial was opened twice")
    _require(len(content["accused"]) > 0, "nobody is accused")
    for claim in content["accused"]:
        used = [claim["serial"], *claim["support"]]
        _require(words.keys() >= set(used) and len(set(used)) == len(used), "an accusation uses words not opened")
    return words


def _chips(
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
    carrier = carriers.draw(key, spec, content["commitment"]["header"]["num_chips"])
    try:
        return verdicts.read(suspect, base, spec, carrier, reading)
    except ValueError as error:
        raise _Fails(str(error)) from None


def _statements(content: dict[str, Any]) -> tuple[str, ...]:
    suspects, readings = content["num_suspects"], content["num_alignments"]
    occasion = content["verdict"]["occasion"]
    return (
        f"that {suspects} suspect(s) were examined together, in {readings} reading(s) each: p-values count them",
        f"that it was occasion {occasion} of tracing this model: alpha holds for each occasion",
        "that no copy with this codeword was made for anybody but the accused",
    )
