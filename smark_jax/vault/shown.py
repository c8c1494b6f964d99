"""Records in the vault's log which probes were shown to whom, before a suspect is asked.

Somebody who runs a suspect service can put probes that they have seen to an innocent customer's service, and give its
answers the next time. So a query asks probes that nobody has been shown, drawn with the master key, and the log records
which ones are left.
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
# The expected share of probes that a suspect answers as its copy was taught, and how many standard deviations below
# that share the number of probes allows for.
_AGREEMENT, _DEVIATIONS = 0.9, 2.0


class Shown(NamedTuple):
    """One occasion on which probes were shown.

    Attributes:
      session: the query's name, in hex; a query that asks more probes later keeps it. Empty in records made before
        sessions existed.
      target: the address or command that was asked.
      time: when.
      probes: their numbers.
    """

    session: str
    target: str
    time: str
    probes: tuple[int, ...]


def history(vault: folder.Vault, model: str, num_chips: int) -> list[Shown]:
    """Every occasion on which a model's probes were shown, in order.

    Older versions kept no record, and each of their queries showed all probes. Those queries are found by the verdicts
    and the answer files that they left.
    """
    everything = tuple(range(num_chips))
    found = [Shown("", _UNKNOWN, "", everything) for _ in unrecorded_files(vault, model)]
    for number in store.verdict_numbers(vault.connection, model):
        verdict = verdicts.get(vault, number)
        old = [row for row in verdict.suspects if row.read == "answers" and not row.answers]
        found += [Shown("", row.file, verdict.created, everything) for row in old]
    for entry in log.entries(vault.connection, _EVENT, model):
        of = entry.details
        found.append(Shown(of["session"], _target(vault, of["target"]), entry.time, tuple(of["probes"])))
    return found


def _target(vault: folder.Vault, sealed: str) -> str:
    return records.unseal(_key(vault), bytes.fromhex(sealed)).decode()


def _key(vault: folder.Vault) -> keys.SecretKey:
    """The key that seals targets in the log: addresses and commands may hold passwords, and the log is not secret."""
    return keys.derive(vault.master, "targets")


def unrecorded_files(vault: folder.Vault, model: str) -> list[str]:
    """Names of the unauthenticated answer files of older versions: ``MODEL.0123456789abcdef.json``."""
    names = (path.name for path in (vault.folder / folder.ANSWERS).glob(f"{model}.*"))
    digits = "0123456789abcdef"
    stems = [(name, name[len(model) + 1 :].partition(".json")[0]) for name in names]
    return sorted(name for name, stem in stems if len(stem) == 16 and set(stem) <= set(digits))


def needed(num_customers: int, alpha: float, agreement: float = _AGREEMENT) -> int:
    r"""How many probes suffice to accuse a suspect that answers a share a of them as its copy was taught.

    With s probes, T has mean :math:`(2 a - 1) \sqrt s` and standard deviation :math:`2 \sqrt{a (1 - a)}`. The result is
    the smallest s whose mean lies two standard deviations above Hoeffding's threshold
    :math:`\sqrt{2 \ln(2 N / \alpha)}`, so that about 98 of 100 such suspects exceed it.

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
    """Chooses probes to show a target and records the choice; probes that nobody has seen come first.

    Args:
      vault: an open vault.
      model: its name.
      num_chips: m, the number of its probes.
      target: who is asked.
      count: how many probes.
      session: the session of a query that asks more probes; by default a new one.
      allow_seen: whether to reuse probes that were shown before when there are no others.

    Returns:
      The session.

    Raises:
      SmarkError: when fewer than ``count`` probes are left that nobody has been shown.
    """
    with store.transaction(vault.connection):  # two concurrent queries must not choose the same probes
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
        f"{some}--allow-seen asks others again. A hostile service may have prepared its answers to those by asking an "
        "innocent customer's service, so the verdict says so."
    )
    old = unrecorded_files(vault, model)
    if old:
        cause += (
            f" It is unknown who has seen which probes, since {folder.ANSWERS}/{old[0]} dates from before that was "
            "recorded (remove the file if no query of yours left it)."
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
    """How many of a session's probes had been shown to each other target before."""
    found: Counter[str] = Counter()
    earlier: list[tuple[str, set[int]]] = []
    for shown in before:
        if shown.session == session:
            for target, theirs in earlier:
                found[target] += len(theirs & set(shown.probes))
        else:
            earlier.append((shown.target, set(shown.probes)))
    return {target: count for target, count in found.items() if count}
