"""The probes of a model: images, sealed in the vault, that each copy is taught to answer by its codeword."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from cryptography.exceptions import InvalidTag
from jaxtyping import UInt8

from smark_jax import _io, _validate, blackbox, files, keys
from smark_jax._types import ApplyFn, PyTree
from smark_jax.blackbox import answers as records
from smark_jax.vault import folder, image_files, issuing, models, store, trials

_EPOCHS, _BATCH = 4, 64  # of teaching a copy


def make(
    vault: folder.Vault,
    name: str,
    num_chips: int,
    pictures: UInt8[np.ndarray, "N H W C"],
    base: PyTree = None,
    apply_fn: ApplyFn | None = None,
) -> UInt8[np.ndarray, "m H W C"]:
    """Makes the probes of a model, one per chip. Copies must then be taught to answer them (:func:`teacher`).

    Args:
      vault: an open vault.
      name: of the model, which may be added later.
      num_chips: m.
      pictures: the owner's images.
      base: the base's parameters.
      apply_fn: the base's network. With it, probes are images on which the base is undecided, which costs the copies
        the least accuracy.

    Raises:
      SmarkError: as for :func:`smark_jax.blackbox.probes`, or when the network does not accept the images.
    """
    shape = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
    scores = None
    if apply_fn is not None:
        compiled = jax.jit(apply_fn)
        scores = lambda asked: trials.run("probes", compiled, base, asked)  # noqa: E731
    return blackbox.probes(models.probes_key(vault, name), num_chips, shape, pictures, scores)


def keep(model: models.OpenModel, made: UInt8[np.ndarray, "m H W C"], num_classes: int) -> None:
    """Stores a model's probes, sealed: anybody who has them can read a customer's codeword from its service.

    Raises:
      SmarkError: when ``num_classes`` is not positive.
    """
    _validate.positive("probes", "num_classes", num_classes)
    vault, content = model.vault, io.BytesIO()
    np.savez_compressed(content, images=made)
    _io.write(_path(vault, model.name), records.seal(_file_key(vault, model.name), content.getvalue()), private=True)
    rows = {"probes": [(model.name, hashlib.sha256(made.tobytes()).hexdigest(), num_classes)]}
    folder.record(vault, "probes made", rows, model=model.name)


def load(model: models.OpenModel) -> tuple[np.ndarray, int]:
    """A model's probe images and its number of classes.

    Raises:
      SmarkError: when the model was added without probes, or the file in the vault does not hold them.
    """
    vault, name = model.vault, model.name
    known = store.probes(vault.connection, name)
    if known is None:
        cause = "'smark add-model --probes FILE.npz --classes N' makes them, before copies are issued."
        raise _validate.fail("query", f"probes of {name}", "none", cause)
    path = _path(vault, name)
    content = path.read_bytes()
    plain = not content.startswith(records.SEALED)  # as an older version wrote them
    try:
        content = content if plain else records.unseal(_file_key(vault, name), content)
        made = image_files.pixels(path, content)
    except InvalidTag:
        made = np.zeros(0, np.uint8)
    if hashlib.sha256(made.tobytes()).hexdigest() != known.sha256:
        cause = "Restore the file from your backup."
        raise _validate.fail("vault", f"the probes of {name} in {path}", "another content", cause)
    if plain:
        _io.write(path, records.seal(_file_key(vault, name), content), private=True)
    return made, known.num_classes


def teacher(
    model: models.OpenModel,
    apply_fn: ApplyFn,
    pictures: UInt8[np.ndarray, "N H W C"],
    on_share: Callable[[float], None] = lambda share: None,
) -> issuing.Teacher:
    """The function that teaches copies to answer the model's probes; :func:`smark_jax.vault.issuing.issue` takes it.

    Args:
      model: one that was added with probes.
      apply_fn: ``apply_fn(params, images) -> logits`` of the model's network.
      pictures: training images, without labels; of the probes' shape.
      on_share: called with the finished share of the current copy, from 0 to 1.

    Raises:
      SmarkError: when the model has no probes, the network refuses base or images, or as for
        :func:`smark_jax.blackbox.train_copies`.
    """
    made, num_classes = load(model)
    base, pictures = files.nest(model.base), np.asarray(pictures)
    trials.run("issue", lambda params, some: jax.jit(apply_fn)(params, some), base, pictures[:2])
    batch_size = min(_BATCH, len(pictures))

    def teach(copies: PyTree, words: np.ndarray) -> PyTree:
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
            on_progress=lambda done, total, loss: on_share(done / total),
        ).params

    return teach


def there(model: models.OpenModel) -> bool:
    """Whether a model was added with probes."""
    return store.probes(model.vault.connection, model.name) is not None


def _file_key(vault: folder.Vault, name: str) -> keys.SecretKey:
    return keys.derive(vault.master, name, "probes file")


def _path(vault: folder.Vault, name: str) -> Path:
    return vault.folder / folder.MODELS / f"{name}.probes.npz"
