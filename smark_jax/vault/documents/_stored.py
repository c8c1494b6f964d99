"""Documents that the vault stores as text."""

import json
from typing import Any, TypeVar

from smark_jax import _validate
from smark_jax._documents import Wrong, parse

T = TypeVar("T")


def stored(kind: type[T], text: str | bytes, **more: Any) -> T:
    """Parses a document that the vault stores as text, with additional fields that it stores elsewhere.

    Raises:
      SmarkError: when a newer version of smark-jax wrote it.
    """
    try:
        return parse(kind, {**json.loads(text), **more})
    except Wrong as error:
        cause = "A newer smark-jax wrote it: upgrade smark-jax."
        raise _validate.fail(
            "vault", f"a {kind.__name__.lower()} as this version writes it", f"one whose {error}", cause
        ) from None
