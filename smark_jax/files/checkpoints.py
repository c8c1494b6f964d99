"""Orbax checkpoints as weights: the owner's own, since nothing guards against a hostile folder."""

import os
from pathlib import Path

from smark_jax import _validate
from smark_jax.files import trees
from smark_jax.files.reading import Weights


def read_checkpoint(path: str | os.PathLike[str]) -> Weights:
    """Reads the folder that Orbax's ``StandardCheckpointer`` wrote. It has no hash.

    Raises:
      MissingExtra: without orbax of the extra ``train``.
      SmarkError: when the folder is no such checkpoint.
    """
    import jax  # here and not above: reading files needs no JAX

    with _validate.needs("add-model", "train"):
        import orbax.checkpoint
    try:
        # Without x64, 64-bit leaves would lose precision.
        with jax.enable_x64(True), orbax.checkpoint.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(Path(path).absolute())
    except Exception as error:  # orbax raises errors of every type, with long messages
        got = f"one that orbax cannot read ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
        cause = "Name the folder that StandardCheckpointer wrote, or convert it to safetensors."
        raise _validate.fail("add-model", f"an Orbax checkpoint in {path}", got, cause) from error
    return Weights(trees.flatten(tree), "orbax", "")
