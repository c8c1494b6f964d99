"""Flower's log, on which text of others is plain text on one line."""

from typing import Any

from flwr.common.logger import log as _log

from smark_jax import _foreign


def log(level: int, message: str, *details: Any) -> None:
    """One line of Flower's log; reasons and errors come from clients, who may write what they like."""
    shown = (detail if isinstance(detail, int | float) else _foreign.clean(detail) for detail in details)
    _log(level, message, *shown)
