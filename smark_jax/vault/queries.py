"""Tracing a suspect that only answers: the model's probes in the vault, and the answers already paid for."""

import functools
import hashlib
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from smark_jax import _validate, blackbox, files
from smark_jax._types import ApplyFn, PyTree
from smark_jax.vault import folder, issuing, models, verdicts

_EPOCHS, _BATCH = 4, 64  # of teaching a copy


def images(path: Path) -> np.ndarray:
    """The owner's images in an npz file, under the name ``images``: uint8, shape [N, H, W, C].

    Raises:
      ValueError: when there are none.
    """
    cause = "Save them by numpy.savez(path, images=...)."
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = archive["images"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _validate.fail("probes", f"an npz file with 'images' in {path}", type(error).__name__, cause) from None
    if found.ndim != 4 or found.dtype != np.uint8:
        got = f"shape {found.shape}, dtype {found.dtype}"
        raise _validate.fail("probes", "uint8 images of shape [N, H, W, C]", got, cause)
    return found


def add_probes(
    vault: folder.Vault,
    model: models.Model,
    pictures: UInt8[np.ndarray, "N H W C"],
    num_classes: int,
    apply_fn: ApplyFn | None = None,
) -> None:
    """Makes a model's probes, one for each chip, and keeps them.

    Copies have to be taught to answer them (:func:`teacher`).

    Args:
      vault: an open vault.
      model: of whose customers' copies answers will be asked.
      pictures: the owner's images.
      num_classes: of the model.
      apply_fn: the base's network. Probes are then those on which the base is undecided, which costs copies least
        accuracy.

    Raises:
      ValueError: as :func:`smark_jax.blackbox.probes`.
    """
    _validate.positive("probes", "num_classes", num_classes)
    shape = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
    scores = None
    if apply_fn is not None:
        run = jax.jit(functools.partial(apply_fn, files.nest(models.base(vault, model))))
        scores = lambda asked: np.asarray(run(asked))  # noqa: E731
    made = blackbox.probes(models.probes_key(vault, model.name), model.num_chips, shape, pictures, scores)
    content = io.BytesIO()
    np.savez_compressed(content, images=made)
    folder.write(_path(vault, model.name), content.getvalue())
    rows = {"probes": [(model.name, hashlib.sha256(made.tobytes()).hexdigest(), num_classes)]}
    folder.record(vault, "probes made", rows, model=model.name)


def probes(vault: folder.Vault, name: str) -> tuple[np.ndarray, int]:
    """A model's probe images and its number of classes.

    Raises:
      ValueError: when it was added without, or the file in the vault is another.
    """
    models.get(vault, name)
    row = _row(vault, name)
    if row is None:
        cause = "'smark add-model --probes FILE.npz --classes N' makes them, before copies are issued."
        raise _validate.fail("query", f"probes of {name}", "none", cause)
    made = images(_path(vault, name))
    if hashlib.sha256(made.tobytes()).hexdigest() != row[0]:
        cause = "Restore the file from your backup."
        raise _validate.fail("vault", f"the probes of {name} in {_path(vault, name)}", "another content", cause)
    return made, row[1]


def teacher(
    vault: folder.Vault,
    name: str,
    apply_fn: ApplyFn,
    pictures: UInt8[np.ndarray, "N H W C"],
    on_share: Callable[[float], None] = lambda share: None,
) -> issuing.Teacher:
    """What :func:`smark_jax.vault.issuing.issue` takes to issue copies that answer the model's probes.

    Args:
      vault: an open vault.
      name: of a model that was added with probes.
      apply_fn: ``apply_fn(params, images) -> logits`` of the model's network.
      pictures: training images, without labels; of the probes' shape.
      on_share: called with the share of the copy at hand that is done, from 0 to 1.

    Raises:
      ValueError: when the model has no probes, or as :func:`smark_jax.blackbox.train_copies`.
    """
    made, num_classes = probes(vault, name)
    base = files.nest(models.base(vault, models.get(vault, name)))
    batch_size = min(_BATCH, len(pictures))
    steps = _EPOCHS * (len(pictures) // batch_size)

    def teach(copies: PyTree, words: np.ndarray) -> PyTree:
        count = itertools.count(1)
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
            on_step=lambda: on_share(next(count) / (steps * len(words))),
        ).params

    return teach


def query(
    vault: folder.Vault,
    name: str,
    target: str,
    predict: blackbox.Predict,
    *,
    repeats: int = 1,
    batch_size: int = 64,
    alpha: float | None = None,
    on_answer: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Asks a suspect about every probe, traces the answers, and keeps the verdict.

    Answers are kept as they come: a query of the same target goes on where one failed.

    Returns:
      The verdict document.

    Raises:
      ValueError: when the model has no probes or no customers, or the suspect's answers are no classes.
    """
    pictures, num_classes = probes(vault, name)
    model = models.get(vault, name)
    verdicts.committed(vault, name)
    kept = vault.folder / folder.ANSWERS / f"{name}.{hashlib.sha256(target.encode()).hexdigest()[:16]}.json"
    chips = blackbox.query(
        predict, pictures, num_classes, repeats=repeats, batch_size=batch_size, answers=kept, on_answer=on_answer
    )
    digest = hashlib.sha256(kept.read_bytes()).hexdigest()
    row = {"file": target, "sha256": digest, "content": None, "format": "answers", "read": "answers"}
    rows = [{**row, "error": None, "layout": [], "alignment": None}]
    return verdicts.judge(vault, model, rows, [chips], verdicts.Reading(), alpha=alpha, tried=1)


def has_probes(vault: folder.Vault, name: str) -> bool:
    """Whether a model was added with probes."""
    return _row(vault, name) is not None


def _row(vault: folder.Vault, name: str) -> tuple[str, int] | None:
    query = "SELECT sha256, num_classes FROM probes WHERE model = ?"
    return vault.connection.execute(query, (name,)).fetchone()


def _path(vault: folder.Vault, name: str) -> Path:
    return vault.folder / folder.MODELS / f"{name}.probes.npz"
