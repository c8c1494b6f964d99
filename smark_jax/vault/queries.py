"""Traces a suspect by its answers alone: chooses the probes to ask, and reuses answers already received."""

import datetime
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, blackbox, keys
from smark_jax.blackbox import answers as records
from smark_jax.vault import folder, models, probes, shown, verdicts
from smark_jax.vault.documents import Answers, Suspect, Verdict
from smark_jax.vault.reading import Reading

MAX_AGE = 7.0
"""Days after which answers no longer count."""
CHECKED = 32
"""How many answered probes are asked again before a query continues."""
CHANGED = 8
"""How many of them may be answered with the other half of the classes. Another copy does so for each with probability
1/2, and passes with probability P(Bin(32, 1/2) <= 8) = 0.0035."""


class Query(NamedTuple):
    """A query that is ready to ask.

    Attributes:
      model: the model whose probes are asked.
      target: the address or command.
      session: the query's name in the log, under which the log records the probes it shows.
      probes: their numbers, ascending.
      kept: how many answers the vault already has.
      since: when the first of them came.
    """

    model: models.OpenModel
    target: str
    session: str
    probes: tuple[int, ...]
    kept: int
    since: str | None


def prepare(
    model: models.OpenModel,
    target: str,
    predict: blackbox.Predict,
    *,
    num_probes: int | None = None,
    fresh: bool = False,
    allow_seen: bool = False,
    max_age: float = MAX_AGE,
) -> Query:
    """Chooses probes that nobody has been shown before, and records the choice before the suspect is asked.

    If the target was asked before, that query continues. Its answers count if they are recent enough and the target
    still gives the same answers to a few of the same probes.

    Args:
      model: one with probes and customers.
      target: the address or command; names the suspect.
      predict: the suspect.
      num_probes: how many answers to judge by. By default as many as before, or else as many as
        :func:`smark_jax.vault.shown.needed` returns.
      fresh: set earlier answers aside, and start again with other probes.
      allow_seen: reuse probes that were shown before when too few are left; the verdict then says so.
      max_age: days after which answers no longer count.

    Raises:
      SmarkError: when the model has no probes or no customers, when too few probes are left, or when earlier answers
        are too old, are not authentic, or differ from what the target answers now.
    """
    vault, name = model.vault, model.name
    pictures, num_classes = probes.load(model)
    num_chips = len(pictures)
    customers = verdicts.committed(model).header.customers
    _set_aside(vault, name, target, fresh)
    session = None if fresh else shown.last(vault, name, num_chips, target)
    if session and not _kept(vault, name, target, session).path.exists():
        session = None  # its answers are lost, but its probes were shown
    answers = records.read(_kept(vault, name, target, session)) if session else []
    if answers:
        _check_age(answers, max_age)
        _check_unchanged(predict, pictures, num_classes, answers)
    else:  # a plain grey image first, so that a wrong address uses up no probes
        blackbox.ask(predict, np.full_like(pictures[:1], 128), num_classes)
    before = shown.probes(shown.history(vault, name, num_chips), session) if session else []
    if num_probes is not None and not max(1, len(before)) <= num_probes <= num_chips:
        cause = "--fresh starts again, and may ask fewer." if before else "Each chip has one probe."
        raise _validate.fail("query", f"--probes of {max(1, len(before))} to {num_chips}", str(num_probes), cause)
    wanted = num_probes or len(before) or min(num_chips, shown.needed(customers, model.settings.alpha))
    if wanted > len(before):
        more = wanted - len(before)
        session = shown.record(vault, name, num_chips, target, more, session, allow_seen=allow_seen)
    assert session is not None
    if not answers:
        records.write(_kept(vault, name, target, session), [])
    asked = shown.probes(shown.history(vault, name, num_chips), session)
    return Query(model, target, session, tuple(asked), len(answers), min((a.time for a in answers), default=None))


def ask(
    query: Query,
    predict: blackbox.Predict,
    *,
    repeats: int = 1,
    batch_size: int = 64,
    alpha: float | None = None,
    on_answer: Callable[[int], None] = lambda count: None,
) -> Verdict:
    """Asks a suspect the probes of a query, traces the answers, and keeps the verdict.

    Answers are saved as they arrive, so that a query that failed can be resumed by another of the same target.

    Returns:
      The verdict.

    Raises:
      SmarkError: when the suspect's answers are not class numbers.
    """
    model, vault = query.model, query.model.vault
    pictures, num_classes = probes.load(model)
    kept, asked = _kept(vault, model.name, query.target, query.session), np.array(query.probes)
    read = blackbox.query(
        predict, pictures[asked], num_classes, repeats=repeats, batch_size=batch_size, answers=kept, on_answer=on_answer
    )
    chips = np.zeros(len(pictures))
    chips[asked] = read
    times = [answer.time for answer in records.read(kept)]
    seen = shown.overlap(shown.history(vault, model.name, len(pictures)), query.session)
    details = Answers(len(asked), len(pictures), min(times), max(times), seen)
    row = Suspect(
        file=query.target,
        sha256=hashlib.sha256(kept.path.read_bytes()).hexdigest(),
        content=None,
        format="answers",
        read="answers",
        verdict=verdicts.PENDING,
        error=None,
        accused=(),
        layout=(),
        alignment=None,
        answers=details,
        notes=_notes(details),
    )
    return verdicts.judge(model, [row], [chips], Reading(), alpha=alpha, tried=1, asked=asked)


def _notes(details: Answers) -> tuple[str, ...]:
    """Notes that a reader of the verdict must know."""
    asked = f"{details.asked} of {details.of} probes were asked from {details.from_} to {details.to}"
    note = f"{asked}; none had been shown to anybody before."
    if details.seen_before:
        whom = ", ".join(f"{number} to {target}" for target, number in sorted(details.seen_before.items()))
        note = (
            f"{asked}; of these had been shown before: {whom}. Those who saw them may have prepared the answers by "
            "asking an innocent customer's service. Do not accuse anybody on these answers alone."
        )
    return (
        note,
        "Answers tell whose copy gave them, not who runs the service: one that passes questions on to a customer's own "
        "service answers as that customer's copy does.",
    )


def _kept(vault: folder.Vault, name: str, target: str, session: str) -> blackbox.Answers:
    place = keys.derive(vault.master, name, "answers of", target).to_bytes()[:8].hex()  # does not reveal the target
    file = f"{name}.{place}.{session}.json"
    about = {"model": name, "target": target, "session": session}
    return blackbox.Answers(vault.folder / folder.ANSWERS / file, keys.derive(vault.master, name, "answers"), about)


def _digest(target: str) -> str:
    return hashlib.sha256(target.encode()).hexdigest()[:16]


def _set_aside(vault: folder.Vault, name: str, target: str, fresh: bool) -> None:
    """Refuses unauthenticated answers of older versions; with ``fresh``, sets them aside."""
    path = vault.folder / folder.ANSWERS / f"{name}.{_digest(target)}.json"
    if not path.exists():
        return
    if not fresh:
        cause = (
            "It is from an older version of smark, or somebody put it there, so its answers do not count: --fresh asks "
            "again, and sets the file aside."
        )
        raise _validate.fail("query", f"answers of {target} that this vault kept", f"{path}, unauthenticated", cause)
    path.replace(path.with_name(f"{path.name}.unauthenticated"))


def _check_age(answers: Sequence[blackbox.Answer], max_age: float) -> None:
    oldest = min(answer.time for answer in answers)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(oldest)
    days = age.total_seconds() / 86400
    if not days <= max_age:
        expected = f"answers of the last {max_age:g} days"
        cause = "Another model may be answering by now: --fresh asks again, --max-age DAYS accepts older answers."
        raise _validate.fail("query", expected, f"{len(answers)} since {oldest}, {days:.1f} days ago", cause)


def _check_unchanged(
    predict: blackbox.Predict, pictures: np.ndarray, num_classes: int, answers: Sequence[blackbox.Answer]
) -> None:
    """Repeats a few probes that the target has answered: a different copy would answer half of them differently."""
    number = {digest: place for place, digest in enumerate(blackbox.digests(pictures))}
    label = {number[answer.probe]: answer.label for answer in answers}
    few = np.random.default_rng().permutation(sorted(label))[:CHECKED]
    sides = blackbox.halves(pictures[few], num_classes)
    now = blackbox.ask(predict, pictures[few], num_classes)
    each = np.arange(len(few))
    changed = int((sides[each, now] != sides[each, [label[place] for place in few.tolist()]]).sum())
    if changed > CHANGED * len(few) / CHECKED:
        got = f"other answers to {changed} of {len(few)} probes"
        cause = "Another model seems to answer by now: --fresh asks again, with other probes."
        raise _validate.fail("query", "the target that answered before", got, cause)
