"""Which probes were shown to whom: kept in the vault's log, written before a suspect is asked.

Whoever runs a suspect can ask an innocent customer's service about probes that they have seen, and give its answers the
next time. So a query asks probes that nobody has been shown, drawn by the master key, and the log knows which are left.
"""

import math
import secrets
from collections import Counter
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, errors, keys
from smark_jax.blackbox import answers as records
from smark_jax.vault import folder, log, store, verdicts

_EVENT = "probes shown"
_UNKNOWN = "an unknown target"
# What a suspect is expected to do: answer so many probes as its copy was taught, and no fewer than so many standard
# deviations less.
_AGREEMENT, _DEVIATIONS = 0.9, 2.0


class Shown(NamedTuple):
    """One time that probes were shown.

    Attributes:
      session: the query, in hex; a query that asks more probes later keeps its name. Empty before there were sessions.
      target: the address or command that was asked.
      time: when.
      probes: their numbers.
    """

    session: str
    target: str
    time: str
    probes: tuple[int, ...]


def history(vault: folder.Vault, model: str, num_chips: int) -> list[Shown]:
    """All times that a model's probes were shown, in order.

    Queries of versions that kept no record showed all probes; they left verdicts, and files of answers.
    """
    everything = tuple(range(num_chips))
    found = [Shown("", _UNKNOWN, "", everything) for _ in unrecorded_files(vault, model)]
    for number in store.verdict_numbers(vault.connection, model):
        verdict = verdicts.get(vault, number)
        old = [row for row in verdict.suspects if row.read == "answers" and not row.answers]
        found += [Shown("", row.file, verdict.created, everything) for row in old]
    recorded = (e.body for e in log.entries(vault.connection) if e.body["event"] == _EVENT)
    ours = (body for body in recorded if body["model"] == model)
    return found + [Shown(b["session"], _target(vault, b["target"]), b["time"], tuple(b["probes"])) for b in ours]


def _target(vault: folder.Vault, sealed: str) -> str:
    return records.unseal(_key(vault), bytes.fromhex(sealed)).decode()


def _key(vault: folder.Vault) -> keys.SecretKey:
    """Addresses and commands may hold passwords, and the log lies open: there they are sealed."""
    return keys.derive(vault.master, "targets")


def unrecorded_files(vault: folder.Vault, model: str) -> list[str]:
    """Names of files of answers as versions before wrote them, unauthenticated: ``MODEL.0123456789abcdef.json``."""
    names = (path.name for path in (vault.folder / folder.ANSWERS).glob(f"{model}.*"))
    digits = "0123456789abcdef"
    stems = [(name, name[len(model) + 1 :].partition(".json")[0]) for name in names]
    return sorted(name for name, stem in stems if len(stem) == 16 and set(stem) <= set(digits))


def needed(num_customers: int, alpha: float, agreement: float = _AGREEMENT) -> int:
    r"""How many probes suffice to accuse a suspect that answers a share a of them as its copy was taught.

    With s probes T has the mean :math:`(2 a - 1) \sqrt s` and the standard deviation :math:`2 \sqrt{a (1 - a)}`. The
    number is the smallest whose mean lies two deviations above Hoeffding's threshold
    :math:`\sqrt{2 \ln(2 N / \alpha)}`, so that some 98 of 100 such suspects pass it.

    Args:
      num_customers: N.
      alpha: bound on the probability of accusing anybody innocent.
      agreement: a, above one half.
    """
    threshold = math.sqrt(2 * math.log(2 * num_customers / alpha))
    margin = _DEVIATIONS * 2 * math.sqrt(agreement * (1 - agreement))
    return math.ceil(((threshold + margin) / (2 * agreement - 1)) ** 2)


def record(
    vault: folder.Vault,
    model: str,
    num_chips: int,
    target: str,
    count: int,
    session: str | None = None,
    *,
    allow_seen: bool = False,
) -> str:
    """Chooses probes to show a target, those that nobody has been shown first, and writes it down.

    Args:
      vault: an open vault.
      model: its name.
      num_chips: m, the number of its probes.
      target: who is asked.
      count: how many probes.
      session: of the query that asks more; a new one otherwise.
      allow_seen: whether to take probes that were shown before, where there are no others.

    Returns:
      The session.

    Raises:
      SmarkError: when fewer than ``count`` probes are left that nobody has been shown.
    """
    with store.transaction(vault.connection):  # two queries at once must not choose the same
        before = history(vault, model, num_chips)
        own = {probe for shown in before if session and shown.session == session for probe in shown.probes}
        seen = {probe for shown in before for probe in shown.probes}
        session = session or secrets.token_hex(8)
        secret = keys.derive(vault.master, model, "probes to show", target, session, str(len(own)))
        order = np.random.default_rng(np.frombuffer(secret.to_bytes(), np.uint32)).permutation(num_chips).tolist()
        fresh = [probe for probe in order if probe not in seen]
        if len(fresh) < count and not allow_seen:
            raise _too_few(vault, model, num_chips, count, len(fresh))
        chosen = sorted((fresh + [probe for probe in order if probe in seen - own])[:count])
        sealed = records.seal(_key(vault), target.encode()).hex()
        folder.record(vault, _EVENT, {}, model=model, target=sealed, session=session, probes=chosen)
    return session


def _too_few(vault: folder.Vault, model: str, num_chips: int, count: int, left: int) -> errors.SmarkError:
    expected = f"{count} of the {num_chips} probes of {model} that nobody has been shown"
    some = f"--probes {left} asks those that are left; " if left else ""
    cause = (
        f"{some}--allow-seen takes others as well, whose answers a hostile service may have prepared by asking an "
        "innocent customer's: the verdict then says so."
    )
    old = unrecorded_files(vault, model)
    if old:
        cause += (
            f" Of all of them it is not known who saw them, since {folder.ANSWERS}/{old[0]} is from before that was "
            "recorded (remove it if no query of yours left it)."
        )
    return _validate.fail("query", expected, f"{left} that are left", cause)


def last(vault: folder.Vault, model: str, num_chips: int, target: str) -> str | None:
    """The session of the last query of a target; None before the first."""
    return next(
        (s.session for s in reversed(history(vault, model, num_chips)) if s.session and s.target == target), None
    )


def probes(before: list[Shown], session: str) -> list[int]:
    """The numbers of all probes of a session."""
    return sorted(probe for shown in before if shown.session == session for probe in shown.probes)


def overlap(before: list[Shown], session: str) -> dict[str, int]:
    """Of a session's probes, how many were shown to whom before."""
    found: Counter[str] = Counter()
    earlier: list[tuple[str, set[int]]] = []
    for shown in before:
        if shown.session == session:
            for target, theirs in earlier:
                found[target] += len(theirs & set(shown.probes))
        else:
            earlier.append((shown.target, set(shown.probes)))
    return {target: count for target, count in found.items() if count}
