"""Issues a copy to each customer; the vault registers each copy before its file gets its final name.

First, one transaction licenses the customers and commits to their codewords. Then the copies are processed in batches:
they are written under hidden names, their hashes are registered, and only then are they renamed. So even if the process
dies, the vault knows the hash of every copy under its final name. Running the same command again completes the issue.

While a batch is hashed and written, a thread computes the next one.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smark_jax import _documents, _io, _validate, carriers, embedding, errors, files
from smark_jax._types import PyTree
from smark_jax.vault import _text, commitments, drafts, folder, models, store, trials
from smark_jax.vault.customers import Customer

# Until it gets its final name, a copy is called ".NAME.issuing".
_HIDDEN = ".issuing"
# Limits of a batch of copies. Two batches are in memory at once.
_COPIES_PER_BATCH, _BYTES_PER_BATCH = 32, 1 << 27
# Older versions also registered a hash of the content, which nothing reads and which took as long as the file's.
_NO_CONTENT = ""
# Threads that hash, write and flush files: hashing and writing release the GIL, and flushing waits for the disk.
_WRITERS = 4

Teacher = Callable[[PyTree, np.ndarray], PyTree]
"""Teaches copies (leaves with a leading axis of K) to answer according to their codewords, int8 [K, m]."""


class Issued(NamedTuple):
    """The result of an issue.

    Attributes:
      commitment: the newest commitment, which covers all copies.
      new: how many customers got a licence, and so a codeword, for the first time.
      written: how many files were written; the others existed already.
      files: each customer's file, in the order of serials.
      trial: how the written copies answered; None when no network was given or no copy was written.
      unfit: leaves that an older version marked although they should carry nothing, by name.
    """

    commitment: commitments.Commitment
    new: int
    written: int
    files: tuple[Path, ...]
    trial: trials.Trial | None
    unfit: Mapping[str, carriers.Role]


class _Licence(NamedTuple):
    customer: Customer
    strength: float
    known: frozenset[str]  # SHA-256 of the files registered so far
    path: Path


def issue(
    model: models.OpenModel,
    customers: Sequence[Customer],
    out: Path,
    *,
    strength: float | None = None,
    teach: Teacher | None = None,
    trial: trials.Running | None = None,
    on_copy: Callable[[int], None] = lambda count: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Issued:
    """Issues a model to customers, one file or folder each; issuing again writes the same files.

    A copy has the form of the base, and differs from it only in the bytes of its carrying leaves. A copy is refused
    when its marked leaves are not finite, or fall below zero where the base's do not, or when it answers NaN under
    ``trial``. Its customer keeps serial and codeword, and issuing again completes what is missing.

    A taught copy is reproduced exactly only with the same machine and software. Elsewhere, writing it again changes its
    last digits; the vault registers both versions.

    Args:
      model: of an open vault.
      customers: registered customers.
      out: folder for the files, created if absent.
      strength: of the copies; by default the model's own.
      teach: makes copies that can be traced by their answers, see :func:`smark_jax.vault.probes.teacher`. It changes
        every leaf that gradients can move.
      trial: runs each copy before it is written.
      on_copy: called with the number of copies done.
      on_wait: called when this process has to wait because another one is issuing from the same vault.

    Raises:
      NotFinite: when a taught copy has NaN or infinite weights, or a copy answers NaN or infinite values.
      SmarkError: when there are no customers, a customer has a copy of another strength or an offer of a licence, or a
        copy would not work.
    """
    _validate.positive("issue", "the number of customers", len(customers))
    if strength is not None:
        models.check_strength("issue", strength)
    vault = model.vault
    _refuse_offered(model, customers)
    out.mkdir(parents=True, exist_ok=True)
    with alone(vault, on_wait):
        new = _license(model, customers, strength)
        commitments.write_all(vault)
        licences = _licences(model, customers, out)
        _sweep(out, {licence.path.name for licence in licences})
        missing = [licence for licence in licences if not _is_there(licence, model)]
        done = len(licences) - len(missing)
        on_copy(done)
        for written in _write(model, missing, teach, trial):
            done += written
            on_copy(done)
    newest = commitments.latest(vault, model.name)
    assert newest is not None  # it was made when the first customer was licensed
    tried = trial.found() if trial else None
    paths = tuple(licence.path for licence in licences)
    return Issued(newest, new, len(missing), paths, tried, models.unfit(model))


def to_request(model: models.OpenModel) -> set[int]:
    """Serials of customers who have an offer of a licence, and no copy without a secret word."""
    offered = store.offered(model.vault.connection, model.name)
    return offered - {serial for serial, _ in store.copies(model.vault.connection, model.name, sorted(offered))}


def _refuse_offered(model: models.OpenModel, customers: Sequence[Customer]) -> None:
    """Refuses to make copies without a secret word for customers who would answer an accusation with theirs."""
    waiting = to_request(model)
    if names := [customer.name for customer in customers if customer.serial in waiting]:
        got = f"{', '.join(map(repr, names[:5]))}{' and others' if len(names) > 5 else ''}, who have an offer of one"
        cause = (
            "A copy without a secret word, if it leaked, would name a customer whose word is not in it. Their requests "
            "make their copies: smark issue --request."
        )
        raise _validate.fail("issue", "customers without a licence", got, cause)


@contextlib.contextmanager
def alone(vault: folder.Vault, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lets only one process issue at a time; if that process dies, the operating system frees its lock."""
    path = vault.folder / "issue.lock"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_io.locked(path))
        except TimeoutError:
            on_wait()
            held.enter_context(_io.locked(path, seconds=-1))
        yield


def license_customers(model: models.OpenModel, customers: Sequence[Customer]) -> int:
    """Licenses customers who have no licence, and publishes the commitment, without making copies; returns how many."""
    with alone(model.vault):
        new = _license(model, customers, None)
        commitments.write_all(model.vault)
    return new


def _license(model: models.OpenModel, customers: Sequence[Customer], strength: float | None) -> int:
    """Gives a licence to each customer without one, all under one new commitment; returns how many."""
    vault = model.vault
    held = store.licences(vault.connection, model.name, [customer.serial for customer in customers])
    licensed = [customer for customer in customers if customer.serial in held]
    other = [c.name for c in licensed if strength is not None and held[c.serial].strength != strength]
    if other:
        got = f"another one in the copies of {', '.join(map(repr, other[:5]))}"
        cause = "A customer has one copy of a model: leave --strength out to write it again."
        raise _validate.fail("issue", f"strength {strength:g}", got, cause)
    new = sorted({customer for customer in customers if customer.serial not in held})
    if not new:
        return 0
    drawn = drafts.issuable(model, [customer.serial for customer in new])
    hashed = commitments.leaves(model, new)
    rows = [
        (model.name, customer.serial, model.settings.strength if strength is None else strength, leaf)
        for customer, leaf in zip(new, hashed, strict=True)
    ]
    with store.transaction(vault.connection):
        if drafts.issuable(model, [new[-1].serial]) != drawn:
            cause = "Nothing was issued: run this again."
            raise _validate.fail("issue", "words that stay as they are", "words drawn meanwhile", cause)
        tree = store.leaves(vault.connection, model.name) | {serial: leaf for _, serial, _, leaf in rows}
        commitment = commitments.build(model, [tree[serial] for serial in sorted(tree)])
        added = {"commitments": [commitments.row(commitment)], "licences": [(*row, commitment.number) for row in rows]}
        folder.record(vault, "customers licensed", added, model=model.name, number=commitment.number)
    return len(new)


def _licences(model: models.OpenModel, customers: Sequence[Customer], out: Path) -> list[_Licence]:
    serials = [customer.serial for customer in customers]
    held = store.licences(model.vault.connection, model.name, serials)
    known: dict[int, set[str]] = {}
    for serial, sha256 in store.copies(model.vault.connection, model.name, serials):
        known.setdefault(serial, set()).add(sha256)
    names = {c: _text.file_name(c.serial, c.name, model.settings.form) for c in set(customers)}
    return [
        _Licence(c, held[c.serial].strength, frozenset(known.get(c.serial, ())), out / names[c]) for c in sorted(names)
    ]


def _write(
    model: models.OpenModel,
    licences: Sequence[_Licence],
    teach: Teacher | None,
    trial: trials.Running | None,
) -> Iterator[int]:
    """Writes copies in batches; yields the size of each batch."""
    if not licences:
        return
    base = model.base
    size = sum(leaf.nbytes for leaf in base.values())
    # A taught copy takes a minute to make, so each is saved as soon as it is ready.
    count = 1 if teach else max(1, min(_COPIES_PER_BATCH, _BYTES_PER_BATCH // size))
    batches: list[list[_Licence]] = []
    for strength in sorted({licence.strength for licence in licences}):
        alike = [licence for licence in licences if licence.strength == strength]
        batches += [alike[start : start + count] for start in range(0, len(alike), count)]
    copies = _maker(model, teach, count)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as maker,
        concurrent.futures.ThreadPoolExecutor(_WRITERS) as writers,
    ):
        ahead = maker.submit(copies, batches[0])
        for number, some in enumerate(batches):
            changed = ahead.result()
            if number + 1 < len(batches):
                ahead = maker.submit(copies, batches[number + 1])
            parts = [licence.path.with_name(f".{licence.path.name}{_HIDDEN}") for licence in some]
            made = [dict(base) | leaves for leaves in changed]
            if trial:
                for licence, leaves in zip(some, made, strict=True):
                    trial.add(licence.customer.name, leaves)
            hashed = list(writers.map(model.form.make, parts, made))
            del changed, made  # otherwise three batches would be in memory
            rows = [
                (model.name, licence.customer.serial, sha256, _NO_CONTENT, _documents.now())
                for licence, sha256 in zip(some, hashed, strict=True)
                if sha256 not in licence.known
            ]
            if rows:
                folder.record(model.vault, "copies made", {"copies": rows}, model=model.name)
            for part, licence in zip(parts, some, strict=True):
                part.replace(licence.path)
            _io.flush_folder(some[0].path.parent)
            yield len(some)


def _maker(
    model: models.OpenModel, teach: Teacher | None, count: int
) -> Callable[[list[_Licence]], list[dict[str, np.ndarray]]]:
    """Makes a function that computes copies: of each the leaves that differ from the base."""
    base, codewords = model.base, model.codewords
    mark = model.mark._replace(spec=carriers.with_ties(model.settings.spec, base))
    marked = {name for leaf in mark.spec.leaves for name in (leaf.path, *leaf.tied)}
    above = sorted(name for name in marked if base[name].min() >= 0)
    # float64 stays on the host: JAX would narrow it
    placed = {name: jnp.asarray(leaf) if name in marked and leaf.itemsize <= 4 else leaf for name, leaf in base.items()}
    roles = carriers.roles(dict(base)) if teach else {}
    trained = {name for name, role in roles.items() if role.trains}

    def embedded(some: list[_Licence], words: np.ndarray) -> Iterator[dict[str, Any]]:
        """A full batch in one program, which takes long to compile; fewer copies one by one. The bits are the same."""
        if len(some) < count or count == 1:
            yield from (embedding.embed(placed, mark, word, some[0].strength) for word in words)
        else:
            batch: dict[str, Any] = embedding.embed_batch(placed, mark, words, some[0].strength)
            batch = {name: np.asarray(batch[name]) for name in marked}
            yield from ({name: leaf[row] for name, leaf in batch.items()} for row in range(count))

    def copies(some: list[_Licence]) -> list[dict[str, np.ndarray]]:
        words, made = codewords([licence.customer.serial for licence in some]), []
        for licence, word, leaves in zip(some, words, embedded(some, words), strict=True):
            for name in above:
                _refuse_below(name, float(leaves[name].min()), licence.customer)
            if teach:
                stacked = {name: np.asarray(leaf)[None] for name, leaf in leaves.items()}
                taught = files.flatten(teach(files.nest(stacked), word[None]))
                leaves |= {name: taught[name][0].astype(base[name].dtype) for name in trained}
                _refuse_infinite({name: leaves[name] for name in trained}, licence.customer)
            made.append(jax.device_get({name: leaves[name] for name in marked | trained}))
        return made

    return copies


def _refuse_infinite(taught: Mapping[str, np.ndarray], customer: Customer) -> None:
    """Refuses a taught copy with a weight that is not finite; what is embedded is checked there."""
    for name, leaf in taught.items():
        if not np.isfinite(np.asarray(leaf).astype(np.float32)).all():
            got = f"NaN or infinite ones in the copy of {customer.name}, which is not written"
            cause = "Teaching diverged: are the images of --teach of the kind that the network was trained on?"
            expected = f"finite weights in leaf {name!r}"
            raise _validate.fail("issue", expected, got, cause, kind=errors.NotFinite)


def _refuse_below(name: str, lowest: float, customer: Customer) -> None:
    if lowest < 0:
        got = f"{lowest:.3g} in the copy of {customer.name}, which is not written"
        cause = (
            "Issue it with less --strength, or add the model again under another name, which leaves such leaves alone."
        )
        raise _validate.fail("issue", f"values of zero and above in leaf {name!r}, as the base has them", got, cause)


def _sweep(out: Path, names: set[str]) -> None:
    """Removes half-written files of these copies left by runs that were killed."""
    for path in out.iterdir():
        hidden, mark, _ = path.name.partition(_HIDDEN)
        if mark and hidden.startswith(".") and hidden.lstrip(".") in names:  # older versions put a second dot in front
            _io.remove(path)


def _is_there(licence: _Licence, model: models.OpenModel) -> bool:
    """Whether the customer's copy exists under its final name; refuses to overwrite what must be kept."""
    found = model.form.sha256_of(licence.path)
    if found in licence.known:
        return True
    _refuse_base(licence.path, model)
    _refuse_other(licence.path, found, model)
    return False


def _refuse_base(path: Path, model: models.OpenModel) -> None:
    """Refuses to overwrite the owner's base when it has a copy's name; a damaged copy is simply rewritten."""
    try:
        is_base = path.is_file() and files.content_hash(files.read(path).leaves) == model.settings.base
    except errors.Unreadable:
        return
    if is_base:
        cause = "Name another folder with --out, or move the base."
        raise _validate.fail("issue", f"a copy, or nothing, in {path}", f"the base of {model.name}", cause)


def _refuse_other(path: Path, sha256: str | None, model: models.OpenModel) -> None:
    """Refuses to overwrite a copy of another model, since copies of all models have the same names, or a folder."""
    expected = f"a copy of {model.name}, or nothing, in {path}"
    if sha256 and (other := store.model_of_copy(model.vault.connection, sha256, but=model.name)):
        raise _validate.fail("issue", expected, f"one of {other}", "Name a folder for each model with --out.")
    if path.is_dir():
        raise _validate.fail("issue", expected, "a folder that is none", "Move it away, and issue again.")
