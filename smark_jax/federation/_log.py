"""Writes to Flower's log; untrusted text appears as plain text on one line."""

from typing import Any

from flwr.common.logger import log as _log

from smark_jax import _foreign


def log(level: int, message: str, *details: Any) -> None:
    """Writes one line to Flower's log; reasons and errors come from clients, who can put anything there."""
    shown = (detail if isinstance(detail, int | float) else _foreign.clean(detail) for detail in details)
    _log(level, message, *shown)
