"""Tracing a suspect that only answers: the model's probes in the vault, and the answers already paid for."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from smark_jax import _validate, blackbox
from smark_jax.vault import folder, models, verdicts


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
    vault: folder.Vault, model: models.Model, pictures: UInt8[np.ndarray, "N H W C"], num_classes: int
) -> None:
    """Makes a model's probes, one for each chip, and keeps them.

    Copies have to be taught to answer them (:func:`smark_jax.blackbox.train_copies`).
    """
    _validate.positive("probes", "num_classes", num_classes)
    shape = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
    made = blackbox.probes(models.probes_key(vault, model.name), model.num_chips, shape, pictures)
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
    model = models.get(vault, name)
    query = "SELECT sha256, num_classes FROM probes WHERE model = ?"
    row = vault.connection.execute(query, (model.name,)).fetchone()
    if row is None:
        cause = "'smark add-model --probes FILE.npz --classes N' makes them, before copies are issued."
        raise _validate.fail("query", f"probes of {name}", "none", cause)
    made = images(_path(vault, name))
    if hashlib.sha256(made.tobytes()).hexdigest() != row[0]:
        cause = "Restore the file from your backup."
        raise _validate.fail("vault", f"the probes of {name} in {_path(vault, name)}", "another content", cause)
    return made, row[1]


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


def _path(vault: folder.Vault, name: str) -> Path:
    return vault.folder / folder.MODELS / f"{name}.probes.npz"
