"""Tracing a suspect that only answers: the model's probes in the vault, and the answers already paid for."""

import datetime
import hashlib
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from cryptography.exceptions import InvalidTag
from jaxtyping import UInt8

from smark_jax import _io, _validate, blackbox, files, keys
from smark_jax._types import ApplyFn, PyTree
from smark_jax.blackbox import answers as records
from smark_jax.vault import folder, issuing, models, shown, store, trials, verdicts

MAX_AGE = 7.0
"""Days after which answers no longer count."""
_EPOCHS, _BATCH = 4, 64  # of teaching a copy
_CHECKED = 16  # answers that are asked again before a query goes on


def images(path: Path) -> np.ndarray:
    """The owner's images in an npz file, under the name ``images``: uint8, shape [N, H, W, C].

    Raises:
      SmarkError: when there are none.
    """
    return _images(path, path)


def _images(path: Path, source: Path | io.BytesIO) -> np.ndarray:
    cause = "Save them with NumPy, as an npz file that holds them under the name 'images'."
    try:
        with np.load(source, allow_pickle=False) as archive:
            found = archive["images"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _validate.fail("probes", f"an npz file with 'images' in {path}", type(error).__name__, cause) from None
    if found.ndim != 4 or found.dtype != np.uint8:
        got = f"shape {found.shape}, dtype {found.dtype}"
        raise _validate.fail("probes", "uint8 images of shape [N, H, W, C]", got, cause)
    return found


def make_probes(
    vault: folder.Vault,
    name: str,
    num_chips: int,
    pictures: UInt8[np.ndarray, "N H W C"],
    base: PyTree = None,
    apply_fn: ApplyFn | None = None,
) -> UInt8[np.ndarray, "m H W C"]:
    """Probes for a model, one for each chip. Copies have to be taught to answer them (:func:`teacher`).

    Args:
      vault: an open vault.
      name: of the model, which may be added later.
      num_chips: m.
      pictures: the owner's images.
      base: the base's parameters.
      apply_fn: its network. Probes are then those on which the base is undecided, which costs copies least accuracy.

    Raises:
      SmarkError: as :func:`smark_jax.blackbox.probes`, or when the network does not take the images.
    """
    shape = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
    scores = None
    if apply_fn is not None:
        compiled = jax.jit(apply_fn)
        scores = lambda asked: trials.run("probes", compiled, base, asked)  # noqa: E731
    return blackbox.probes(models.probes_key(vault, name), num_chips, shape, pictures, scores)


def keep_probes(vault: folder.Vault, model: models.Model, made: UInt8[np.ndarray, "m H W C"], num_classes: int) -> None:
    """Keeps a model's probes, sealed: who has them has customers' codewords from their services.

    Raises:
      SmarkError: when ``num_classes`` is no positive number.
    """
    _validate.positive("probes", "num_classes", num_classes)
    content = io.BytesIO()
    np.savez_compressed(content, images=made)
    _io.write(_path(vault, model.name), records.seal(_file_key(vault, model.name), content.getvalue()), private=True)
    rows = {"probes": [(model.name, hashlib.sha256(made.tobytes()).hexdigest(), num_classes)]}
    folder.record(vault, "probes made", rows, model=model.name)


def probes(vault: folder.Vault, name: str) -> tuple[np.ndarray, int]:
    """A model's probe images and its number of classes.

    Raises:
      SmarkError: when it was added without, or the file in the vault is another.
    """
    models.get(vault, name)
    known = store.probes(vault.connection, name)
    if known is None:
        cause = "'smark add-model --probes FILE.npz --classes N' makes them, before copies are issued."
        raise _validate.fail("query", f"probes of {name}", "none", cause)
    path = _path(vault, name)
    content = path.read_bytes()
    plain = not content.startswith(records.SEALED)  # as an older version wrote them
    try:
        content = content if plain else records.unseal(_file_key(vault, name), content)
        made = _images(path, io.BytesIO(content))
    except InvalidTag:
        made = np.zeros(0, np.uint8)
    if hashlib.sha256(made.tobytes()).hexdigest() != known.sha256:
        cause = "Restore the file from your backup."
        raise _validate.fail("vault", f"the probes of {name} in {path}", "another content", cause)
    if plain:
        _io.write(path, records.seal(_file_key(vault, name), content), private=True)
    return made, known.num_classes


def teacher(
    vault: folder.Vault,
    name: str,
    apply_fn: ApplyFn,
    pictures: UInt8[np.ndarray, "N H W C"],
    on_share: Callable[[float], None] = lambda share: None,
) -> issuing.Teacher:
    """What :func:`smark_jax.vault.issuing.issue` takes to issue copies that answer the model's probes.

    Args:
      vault: an open vault.
      name: of a model that was added with probes.
      apply_fn: ``apply_fn(params, images) -> logits`` of the model's network.
      pictures: training images, without labels; of the probes' shape.
      on_share: called with the share of the copy at hand that is done, from 0 to 1.

    Raises:
      SmarkError: when the model has no probes, or as :func:`smark_jax.blackbox.train_copies`.
    """
    made, num_classes = probes(vault, name)
    base = files.nest(models.base(vault, models.get(vault, name)))
    batch_size = min(_BATCH, len(pictures))
    steps = _EPOCHS * (len(pictures) // batch_size)

    def teach(copies: PyTree, words: np.ndarray) -> PyTree:
        count = itertools.count(1)
        return blackbox.train_copies(
            copies,
            base,
            apply_fn,
            pictures,
            made,
            words,
            num_classes,
            epochs=_EPOCHS,
            batch_size=batch_size,
            on_step=lambda: on_share(next(count) / (steps * len(words))),
        ).params

    return teach


class Query(NamedTuple):
    """A query that is ready to ask.

    Attributes:
      model: its name.
      target: the address or command.
      session: in the log, which says what probes it shows.
      probes: their numbers, ascending.
      kept: how many answers are there already.
      since: when the first of them came.
    """

    model: str
    target: str
    session: str
    probes: tuple[int, ...]
    kept: int
    since: str | None


def prepare(
    vault: folder.Vault,
    name: str,
    target: str,
    predict: blackbox.Predict,
    *,
    num_probes: int | None = None,
    fresh: bool = False,
    allow_seen: bool = False,
    max_age: float = MAX_AGE,
) -> Query:
    """Decides which probes a suspect is shown, those that nobody was shown before, and writes that down.

    Where the target was asked before, that query goes on: its answers count, if they are young enough and the target,
    asked a few of the same probes again, still answers so.

    Args:
      vault: an open vault.
      name: of a model with probes and customers.
      target: the address or command; names the suspect.
      predict: the suspect.
      num_probes: how many answers to judge by; as many as before, or as :func:`smark_jax.vault.shown.needed` says.
      fresh: leave earlier answers aside, and begin anew with other probes.
      allow_seen: take probes that were shown before where too few are left; the verdict then says so.
      max_age: days after which answers no longer count.

    Raises:
      SmarkError: when the model has no probes or no customers, too few probes are left, or earlier answers are too old,
        are not authentic, or are no longer those of the target.
    """
    pictures, num_classes = probes(vault, name)
    num_chips = len(pictures)
    customers = verdicts.committed(vault, name).header["customers"]
    _set_aside(vault, name, target, fresh)
    session = None if fresh else shown.last(vault, name, num_chips, target)
    if session and not _kept(vault, name, target, session).path.exists():
        session = None  # what it was answered is lost, and its probes were shown
    answers = records.read(_kept(vault, name, target, session)) if session else []
    if answers:
        _check_age(answers, max_age)
        _check_unchanged(predict, pictures, num_classes, answers)
    else:  # a grey picture first, so that a wrong address costs no probes
        blackbox.ask(predict, np.full_like(pictures[:1], 128), num_classes)
    before = shown.probes(shown.history(vault, name, num_chips), session) if session else []
    if num_probes is not None and not max(1, len(before)) <= num_probes <= num_chips:
        cause = "--fresh begins anew, and may ask fewer." if before else "Each chip has one probe."
        raise _validate.fail("query", f"--probes of {max(1, len(before))} to {num_chips}", str(num_probes), cause)
    wanted = num_probes or len(before) or min(num_chips, shown.needed(customers, models.get(vault, name).alpha))
    if wanted > len(before):
        more = wanted - len(before)
        session = shown.record(vault, name, num_chips, target, more, session, allow_seen=allow_seen)
    assert session is not None
    if not answers:
        records.write(_kept(vault, name, target, session), [])
    asked = shown.probes(shown.history(vault, name, num_chips), session)
    return Query(name, target, session, tuple(asked), len(answers), min((a.time for a in answers), default=None))


def ask(
    vault: folder.Vault,
    query: Query,
    predict: blackbox.Predict,
    *,
    repeats: int = 1,
    batch_size: int = 64,
    alpha: float | None = None,
    on_answer: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Asks a suspect about the probes of a query, traces the answers, and keeps the verdict.

    Answers are kept as they come: a query of the same target goes on where one failed.

    Returns:
      The verdict document.

    Raises:
      SmarkError: when the suspect's answers are no classes.
    """
    pictures, num_classes = probes(vault, query.model)
    model = models.get(vault, query.model)
    kept, asked = _kept(vault, query.model, query.target, query.session), np.array(query.probes)
    read = blackbox.query(
        predict, pictures[asked], num_classes, repeats=repeats, batch_size=batch_size, answers=kept, on_answer=on_answer
    )
    chips = np.zeros(len(pictures))
    chips[asked] = read
    times = [answer.time for answer in records.read(kept)]
    seen = shown.overlap(shown.history(vault, model.name, len(pictures)), query.session)
    details = {"asked": len(asked), "of": len(pictures), "from": min(times), "to": max(times), "seen_before": seen}
    digest = hashlib.sha256(kept.path.read_bytes()).hexdigest()
    row = {"file": query.target, "sha256": digest, "content": None, "format": "answers", "read": "answers"}
    rows = [{**row, "error": None, "layout": [], "alignment": None, "answers": details, "notes": _notes(details)}]
    return verdicts.judge(vault, model, rows, [chips], verdicts.Reading(), alpha=alpha, tried=1, asked=asked)


def _notes(details: dict[str, Any]) -> list[str]:
    """What a reader of the verdict must know."""
    count, seen = f"{details['asked']} of {details['of']} probes", details["seen_before"]
    notes = [f"{count} were asked from {details['from']} to {details['to']}; none had been shown to anybody before."]
    if seen:
        whom = ", ".join(f"{number} to {target}" for target, number in sorted(seen.items()))
        notes = [
            f"{count} were asked from {details['from']} to {details['to']}; of these had been shown before: {whom}. "
            "Whoever saw them may have prepared the answers by asking an innocent customer's service. Do not accuse "
            "anybody on these answers alone."
        ]
    return [
        *notes,
        "Answers tell whose copy gave them, not who runs the service: one that passes questions on to a customer's own "
        "service answers as that customer's copy does.",
    ]


def _kept(vault: folder.Vault, name: str, target: str, session: str) -> blackbox.Answers:
    place = keys.derive(vault.master, name, "answers of", target).to_bytes()[:8].hex()  # tells nobody the target
    file = f"{name}.{place}.{session}.json"
    about = {"model": name, "target": target, "session": session}
    return blackbox.Answers(vault.folder / folder.ANSWERS / file, keys.derive(vault.master, name, "answers"), about)


def _digest(target: str) -> str:
    return hashlib.sha256(target.encode()).hexdigest()[:16]


def _set_aside(vault: folder.Vault, name: str, target: str, fresh: bool) -> None:
    """Refuses answers that versions before kept without authentication; leaves them aside when asked to begin anew."""
    path = vault.folder / folder.ANSWERS / f"{name}.{_digest(target)}.json"
    if not path.exists():
        return
    if not fresh:
        cause = (
            "It is from an older version of smark, or somebody put it there, so its answers count for nothing: --fresh "
            "asks again, and leaves the file aside."
        )
        raise _validate.fail("query", f"answers of {target} that this vault kept", f"{path}, unauthenticated", cause)
    path.replace(path.with_name(f"{path.name}.unauthenticated"))


def _check_age(answers: Sequence[blackbox.Answer], max_age: float) -> None:
    oldest = min(answer.time for answer in answers)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(oldest)
    days = age.total_seconds() / 86400
    if not days <= max_age:
        expected = f"answers of the last {max_age:g} days"
        cause = "What answers there may be another model by now: --fresh asks again, --max-age DAYS takes older ones."
        raise _validate.fail("query", expected, f"{len(answers)} since {oldest}, {days:.1f} days ago", cause)


def _check_unchanged(
    predict: blackbox.Predict, pictures: np.ndarray, num_classes: int, answers: Sequence[blackbox.Answer]
) -> None:
    """Asks a few probes again that the target has answered: another copy differs in half of them."""
    number = {digest: place for place, digest in enumerate(blackbox.digests(pictures))}
    label = {number[answer.probe]: answer.label for answer in answers}
    few = np.random.default_rng().permutation(sorted(label))[:_CHECKED]
    sides = blackbox.halves(pictures[few], num_classes)
    now = blackbox.ask(predict, pictures[few], num_classes)
    each = np.arange(len(few))
    changed = int((sides[each, now] != sides[each, [label[place] for place in few.tolist()]]).sum())
    if changed > len(few) / 4:
        got = f"other answers to {changed} of {len(few)} probes"
        cause = "Another model seems to answer by now: --fresh asks again, with other probes."
        raise _validate.fail("query", "the target that answered before", got, cause)


def has_probes(vault: folder.Vault, name: str) -> bool:
    """Whether a model was added with probes."""
    return store.probes(vault.connection, name) is not None


def _file_key(vault: folder.Vault, name: str) -> keys.SecretKey:
    return keys.derive(vault.master, name, "probes file")


def _path(vault: folder.Vault, name: str) -> Path:
    return vault.folder / folder.MODELS / f"{name}.probes.npz"
