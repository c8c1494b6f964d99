"""The configuration of ``smark train``: a TOML file with one key per setting; every key is optional."""

import difflib
import math
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from smark_jax import _validate

EXAMPLE = """\
# smark train train.toml --out out/base
# Every key is optional; these are the defaults.

network = "cnn"          # "cnn" (421,642 weights on 28 x 28 digits) or "resnet18" (11 million)
dataset = "mnist_5k"     # the embedded digits, or any image classification set of TensorFlow Datasets: "cifar10"
train_split = "train"    # in TFDS notation, such as "train[:90%]"
test_split = "test"      # what the accuracy is measured on

parties = 4              # data holders; their gradients leave them only under masks
epochs = 15              # passes over the training data
batch = 32               # examples per party and round
learning_rate = 2e-3     # of Adam; falls to zero along a cosine
clip = 1.0               # bound on the norm of a party's gradient
seed = 0                 # of initialisation, split and shuffles; never of a secret

owner_mark = true        # mark the base as the owner's own while it is trained; needs the folder "private" to prove it
checkpoint_every = 100   # rounds between checkpoints, from which a killed run resumes
"""

NETWORKS = {"cnn": "CNN", "resnet18": "ResNet18"}
"""The networks that a configuration names, as :mod:`smark_jax.models` calls them."""
_RANGES = {"seed": (0, 2**32 - 1), "parties": (1, 1024), "epochs": (1, 1_000_000)}  # all others: 1 to 2^31 - 1


class Config(NamedTuple):
    """The settings; :data:`EXAMPLE` explains them."""

    network: str = "cnn"
    dataset: str = "mnist_5k"
    train_split: str = "train"
    test_split: str = "test"
    parties: int = 4
    epochs: int = 15
    batch: int = 32
    learning_rate: float = 2e-3
    clip: float = 1.0
    seed: int = 0
    owner_mark: bool = True
    checkpoint_every: int = 100


def read(path: Path) -> Config:
    """The configuration in a file.

    Raises:
      SmarkError: when the file is not TOML, or a key or value is not allowed.
      OSError: when the file cannot be read.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # invalid TOML, or invalid UTF-8
        cause = "Compare it with the output of: smark train --example"
        raise _validate.fail("train", f"a TOML file in {path}", str(error), cause) from error
    for name, value in settings.items():
        _check(path, name, value)
    return Config(**{name: type(Config._field_defaults[name])(value) for name, value in settings.items()})


def _check(path: Path, name: str, value: Any) -> None:
    if name not in Config._fields:
        close = difflib.get_close_matches(name, Config._fields, n=1)
        cause = f"Did you mean {close[0]!r}? " if close else ""
        cause += "smark train --example explains them."
        raise _validate.fail("train", f"keys of {', '.join(Config._fields)} in {path}", repr(name), cause)
    kind = type(Config._field_defaults[name])
    wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    fits = isinstance(value, kind | int if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if fits and name == "network":
        wanted, fits = " or ".join(map(repr, NETWORKS)), value in NETWORKS
    elif fits and kind is int:
        least, most = _RANGES.get(name, (1, 2**31 - 1))
        bound = f"at most {most:,}" if value > most else f"at least {least}"
        wanted, fits = f"{wanted} of {bound}", least <= value <= most
    elif fits and kind is float:
        wanted, fits = f"{wanted} above 0", math.isfinite(value) and value > 0
    if not fits:
        raise _validate.fail("train", f"{name} in {path} to be {wanted}", repr(value), "Is it quoted, or out of range?")
