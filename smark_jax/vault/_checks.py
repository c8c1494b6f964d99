"""The checks an arbiter makes before reading a suspect: commitments, models, carrier, leaves and codewords."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smark_jax import carriers, errors, files
from smark_jax.vault import commitments, documents, merkle, models, openings, shapes, timestamps, versions
from smark_jax.vault.documents import Bundle, Commitment, Header, Stamp

# The relative difference allowed between a leaf's RMS on the owner's computer and on the arbiter's.
_ROUNDING = 1e-2
# The header fields that may differ between two commitments to a model.
_PASSING = ("created", "customers", "number", "previous")
DRAWN = ("draft", "public value", "drawn words")
"""The checks of drawn codewords (:mod:`smark_jax.vault._drawn`)."""
# Nothing is computed from a suspect unless all of these hold.
_BEFORE_READING = (
    "level",
    "numbers",
    "commitment",
    "base",
    "carrier",
    "carrying leaves",
    "shape",
    "pieces",
    "customers",
    *DRAWN,
)


class Check(NamedTuple):
    """The result of one check: its name, whether it holds, and details in words."""

    name: str
    holds: bool
    detail: str


class Fails(Exception):
    """A check that does not hold; the text says why."""


class Checks(list[Check]):
    """The checks made so far."""

    @contextlib.contextmanager
    def check(self, name: str, detail: str) -> Iterator[list[str]]:
        """Adds a check, which holds unless the block raises :class:`Fails`; the block may append details."""
        details = [detail]
        try:
            yield details
        except Fails as error:
            self.append(Check(name, False, str(error)))
        else:
            self.append(Check(name, True, ", ".join(details)))


def require(holds: bool, otherwise: str) -> None:
    """Fails the current check with the reason ``otherwise``, unless ``holds``."""
    if not holds:
        raise Fails(otherwise)


def fails(error: errors.SmarkError) -> Fails:
    """A refusal as the reason why a check does not hold, on one line."""
    return Fails(" ".join(error.desk.splitlines()))


def refuse(wrong: str | None) -> None:
    """Fails the current check with what is wrong, if anything is."""
    require(wrong is None, wrong or "")


class Proved(NamedTuple):
    """What the bundle proves was committed to: the mark, by leaves, shape and carrier; and codewords by serial."""

    mark: carriers.Mark
    words: dict[int, np.ndarray]


def check_commitments(checks: Checks, bundle: Bundle, roots: Sequence[str]) -> None:
    """Checks the chain of commitments, their time stamps, and the published roots."""
    chain = bundle.chain
    for before, item in zip([None, *chain], chain, strict=False):
        tree = item.commitment
        with checks.check("commitment", f"number {tree.number} to {tree.model}, root {tree.root}"):
            _follow(tree, before.commitment if before else None)
        for stamp in item.timestamps:
            detail = f"{stamp.time}; check the authority's signature with 'openssl ts -verify'"
            with checks.check("time stamp", detail):
                require(_stamped(tree, stamp), "it is about another commitment, or states another time")
    if roots:
        with checks.check("published root", "the same as the commitment's"):
            _check_published(bundle, roots)


def check_contents(
    checks: Checks, bundle: Bundle, folder: Path, suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]
) -> Proved | None:
    """Checks models, carrier, leaves, shape and codewords against the commitment.

    Args:
      checks: to which these are added.
      bundle: the evidence.
      folder: where the shape's file is.
      suspect: the leaves of the model in dispute.
      base: those of the base.

    Returns:
      What is proved; None when it does not allow a reading.
    """
    header = bundle.header
    key = openings.keys_of(bundle)
    spec, mark, words = None, None, {}
    with checks.check("base", f"content hash {header.base}"):
        require(files.content_hash(base) == header.base, "it is not the model that was committed to")
    with checks.check("suspect", f"content hash {bundle.suspect.content}"):
        same = files.content_hash(suspect) == bundle.suspect.content
        require(same, "it is not the model that was accused")
    parts = f"{len(bundle.pieces)} of its pieces opened, each by a key" if bundle.pieces else "its key is the one"
    with checks.check("carrier", f"{parts} that was committed to"):
        refuse(openings.wrong_keys(bundle))
    with checks.check("carrying leaves", f"{len(bundle.spec)} leaves, as committed to, and as the base has them"):
        spec = _spec(bundle, base)
    shaped = bool(header.algorithms.shape or header.shape)
    if shaped:
        with checks.check("shape", "its file holds the one that was committed to") as detail:
            require(spec is not None, "the carrying leaves that it is for are not known")
            mark = _mark(bundle, key, spec, folder)
            detail.append(str(mark.shape))
    elif spec is not None and bundle.carrier_key:
        mark = versions.mark(header.algorithms, key, spec, None, header.num_chips, header.strength)
    if bundle.pieces and spec is not None and (mark is not None or not shaped):
        with checks.check("pieces", "those that the hash of carrier and suspect names") as detail:
            mark = mark or _mark(bundle, key, spec, folder)
            of = mark.carrier.num_pieces
            refuse(openings.wrong_choice(bundle, of))
            detail.append(f"{of - len(bundle.pieces)} of {of} pieces of the carrier stay secret")
    with checks.check("customers", f"{len(bundle.opened)} of {header.customers:,} opened, each under the root"):
        words = _words(bundle)
    if mark is None or not all(check.holds for check in checks if check.name in _BEFORE_READING):
        return None
    return Proved(mark, words)


def _mark(bundle: Bundle, key: carriers.Keys, spec: carriers.Spec, folder: Path) -> carriers.Mark:
    """The mark; requires that the shape's file, if the model has one, is the one that was committed to."""
    header, named = bundle.header, bundle.header.algorithms
    same = bool(named.shape) == bool(header.shape)
    require(same, "the commitment names a shape without its digest, or the other way round")
    cause = "It comes with the bundle: put it into the same folder."
    try:
        shape = shapes.read("evidence", folder, named.shape, str(header.shape), cause) if header.shape else None
        return versions.mark(named, key, spec, shape, header.num_chips, header.strength)
    except errors.SmarkError as error:
        raise fails(error) from None


def _follow(tree: Commitment, before: Commitment | None) -> None:
    """Requires that the header leads to the root, and that the commitment follows its predecessor."""
    header = tree.header
    leads = merkle.proves(commitments.header_leaf(header), 0, header.customers + 1, tree.header_path, tree.root)
    require(leads, "the header does not lead to the root")
    if before is not None:
        follows = (header.previous, header.number) == (before.root, before.number + 1)
        require(follows, f"it does not name the commitment of number {before.number} as the one before")
        ours, theirs = _lasting(header), _lasting(before.header)
        other = [name for name in ours if ours[name] != theirs[name]]
        require(not other, f"it is not to the same model: {', '.join(other)}")
        require(header.customers > before.header.customers, "it has no more customers than the one before")


def _lasting(header: Header) -> dict[str, object]:
    """The fields that all commitments to a model share; older headers name the decoder in other fields."""
    missing = documents.MISSING
    same = header._replace(versions=header.algorithms, decoder=missing, decoder_version=missing)
    return {name: value for name, value in same._asdict().items() if name not in _PASSING}


def _check_published(bundle: Bundle, roots: Sequence[str]) -> None:
    """Requires each published root to be in the bundle, and each opened codeword under one of them or an earlier."""
    numbers = {item.commitment.root: item.commitment.number for item in bundle.chain}
    for root in roots:
        require(root in numbers, f"{root} was published: keys or customers were chosen afterwards")
    newest = max(numbers[root] for root in roots)
    for opened in bundle.opened:
        number, customer = bundle.proved_by(opened), opened.leaf.customer
        require(number <= newest, f"the root of commitment {number}, with the codeword of {customer!r}, was not given")


def _stamped(tree: Commitment, stamp: Stamp) -> bool:
    try:
        return timestamps.check(tree.published, bytes.fromhex(stamp.response)) == stamp.time
    except errors.MissingExtra:
        raise
    except errors.SmarkError:
        return False


def _spec(bundle: Bundle, base: Mapping[str, np.ndarray]) -> carriers.Spec:
    """The carrying leaves; requires that they were committed to and belong to the base."""
    spec, header = documents.spec(bundle.spec), bundle.header
    require(models.spec_digest(bundle.spec) == header.spec, "different ones were committed to")
    for leaf, (_, _, committed) in zip(spec.leaves, bundle.spec, strict=True):
        there = base.get(leaf.path)
        require(there is not None and there.shape == leaf.shape, f"the base has no leaf {leaf.path!r} of that shape")
        scale = float(np.sqrt(np.mean(np.square(np.asarray(there, np.float64)))))
        require(abs(scale - committed) <= _ROUNDING * scale, f"the base's {leaf.path!r} has a different RMS")
    require(len({leaf.path for leaf in spec.leaves}) == len(spec.leaves) > 0, "one is named twice, or there are none")
    require(0 < header.num_chips <= spec.num_weights, "there are more chips than weights")
    return spec


def _words(bundle: Bundle) -> dict[int, np.ndarray]:
    """The opened codewords by serial; requires each under its root, and every codeword that an accusation uses."""
    trees = {item.commitment.number: item.commitment for item in bundle.chain}
    num_chips = bundle.header.num_chips
    words = {}
    for opened in bundle.opened:
        leaf, number = opened.leaf, bundle.proved_by(opened)
        require(number in trees, f"the commitment with the leaf of {leaf.customer!r} is not in the bundle")
        tree = trees[number]
        size = tree.header.customers + 1
        there = merkle.proves(commitments.leaf(leaf), opened.index_, size, opened.path, tree.root)
        require(there, f"the leaf of {leaf.customer!r} is not under the root: it is another one")
        require(len(leaf.word) == 2 * -(-num_chips // 8), "a codeword has the wrong length")
        words[leaf.serial] = commitments.word(leaf, num_chips)
    require(len(words) == len(bundle.opened), "a serial was opened twice")
    serials = [claim.serial for claim in bundle.accused]
    require(0 < len(serials) == len(set(serials)), "nobody is accused, or somebody is accused twice")
    for claim in bundle.accused:
        used = [claim.serial, *claim.support]
        require(
            words.keys() >= set(used) and len(set(used)) == len(used),
            "an accusation uses codewords that were not opened",
        )
    return words
