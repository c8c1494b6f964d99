"""The base of a model in the vault: byte for byte what the owner added, in its own form where that can be written.

Copies have the form of the base, and so the suffix of its file; those of a model in several files are folders.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from smark_jax import _io, _validate, carriers, files
from smark_jax.vault import folder

SAFETENSORS = ".safetensors"
"""The form of a base that has none of its own to be written in, and of every base of older versions."""


def path(vault: folder.Vault, model: str, content: str, form: str) -> Path:
    """The file or folder of a model's base.

    Args:
      vault: the vault.
      model: the model's name.
      content: the base's content hash. With it in the name, two processes that add different bases under one name
        cannot overwrite each other's.
      form: what the name ends with.
    """
    return vault.folder / folder.MODELS / f"{model}.{content[:16]}{form}"


def can_carry(form: files.Form, spec: carriers.Spec) -> bool:
    """Whether the leaves that carry can be changed in a form; compressed ones cannot, and copies will be safetensors.

    Raises:
      SmarkError: when one of them is quantised, since its numbers in a copy would be rounded to what the base has.
    """
    without = {leaf.path: form.places[leaf.path] for leaf in spec.leaves if isinstance(form.places[leaf.path], str)}
    if not without:
        return True
    rounded = [name for name, reason in without.items() if reason is files.Unwritable.QUANTISED]
    if rounded:
        more = f" and {len(rounded) - 1:,} other leaves" if len(rounded) > 1 else ""
        got = f"{rounded[0]!r}{more}, quantised"
        cause = "Add the model that was quantised, and quantise its copies; or let match choose leaves of floats."
        desk = "Add the model that was quantised, and quantise its copies; or choose leaves of floats with --match."
        raise _validate.fail("add-model", "carrying weights that are stored as floats", got, cause, desk=desk)
    return False


def keep(place: Path, leaves: Mapping[str, np.ndarray], form: files.Form | None) -> None:
    """Writes the base into the vault, byte for byte if it has a form of its own."""
    if form is None:
        files.write(place, dict(leaves))
    elif form.sha256_of(place) != form.sha256:  # a run that was killed may have left it
        _io.remove(place)
        if form.write(place) != form.sha256:
            cause = "Add it when nobody writes to it."
            raise _validate.fail("add-model", "the base's file as it was", "another content than was read", cause)
