"""The operator's consent: the conditions in the node configuration of a participant's SuperNode."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smark_jax import _validate
from smark_jax.aggregation.protocol import Policy
from smark_jax.aggregation.protocol.parameters import refuse
from smark_jax.federation import identities
from smark_jax.federation.task import Limits

_OPTIONS = {
    "least-parties": int,
    "least-share": float,
    "corruption-rate": float,
    "bind-model": bool,
    "least-clip": float,
    "most-clip": float,
    "weight": str,
    "identity": str,
    "roster": str,
    "federation": str,
}
"""Options and their types, each named ``smark-...`` in the node configuration."""


class Consent(NamedTuple):
    """The rounds and formats in which a participant agrees to take part.

    Attributes:
      policy: the conditions on rounds.
      limits: the limits on formats.
      identity: the file with the participant's identity, or None.
      federation: the name with which sessions must begin; empty for any.
    """

    policy: Policy
    limits: Limits
    identity: Path | None
    federation: str = ""

    def check_session(self, session: bytes) -> None:
        """Refuses runs of another federation, in case a server relays its challenges and rounds."""
        if self.federation and not session.startswith(self.federation.encode() + b"/"):
            cause = "Is a server of another federation passing on what belongs here, or does Masked lack its name?"
            raise refuse("masked_mod", f"a run of federation {self.federation!r}", "another one", cause)


def read(node_config: Mapping[str, Any]) -> Consent:
    """Reads the consent from a node configuration; options that it does not name keep their defaults.

    Raises:
      SmarkError: for an unknown option that begins with ``smark-``, or a value of the wrong type or out of range.
    """
    given = {name.removeprefix("smark-"): value for name, value in node_config.items() if name.startswith("smark-")}
    for name, value in given.items():
        kind = _OPTIONS.get(name)
        if kind is None:
            known = ", ".join(f"smark-{option}" for option in _OPTIONS)
            raise _validate.fail("masked_mod", f"options {known}", f"smark-{name}", "Is the name spelt right?")
        if type(value) is not kind and not (kind is float and type(value) is int):
            got = f"{value!r}"
            cause = "In --node-config, put quotes around texts, but not around numbers or true and false."
            raise _validate.fail("masked_mod", f"smark-{name} to be of type {kind.__name__}", got, cause)
    identity, roster = given.pop("identity", None), given.pop("roster", None)
    federation = given.pop("federation", "")
    options = {name.replace("-", "_"): value for name, value in given.items()}
    policy = Policy()._replace(**{name: value for name, value in options.items() if name in Policy._fields})
    limits = Limits()._replace(**{name: value for name, value in options.items() if name in Limits._fields})
    if roster is not None:
        policy = policy._replace(known=identities.roster(Path(roster)))
    return Consent(_checked(policy), limits, None if identity is None else Path(identity), federation)


def _checked(policy: Policy) -> Policy:
    rates = {"smark-least-share": policy.least_share, "smark-corruption-rate": policy.corruption_rate or 0.0}
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise _validate.fail("masked_mod", f"{name} of 0 to 1", repr(rate), "It is a share of all parties.")
    _validate.positive("masked_mod", "smark-least-parties", policy.least_parties)
    return policy
