"""Loads a network from its file: its weights, and its function."""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _sources, formats, reading
from smark_jax.files.networks import graph, keras, onnx, pt2, tflite

# Of each format, what loads a network, and the module of its operators, which loads JAX.
_KINDS = {
    "onnx": (onnx.load, "onnx_operators"),
    "pt2": (pt2.load, "aten"),
    "tflite": (tflite.load, "tflite_operators"),
    "keras": (keras.load, "keras_layers"),
    "hdf5": (keras.load, "keras_layers"),
}


class Network(NamedTuple):
    """A network: its weights and its function.

    Attributes:
      params: weights and running statistics by name. What does not carry a mark says so by its own name
        (``bn.running_mean``), or its name begins with ``buffers/``.
      apply_fn: ``apply_fn(params, images) -> logits``: pure, compiled, and a plain list of operations in a jaxpr. The
        tree that :func:`smark_jax.files.nest` makes of ``params`` will do as well.
    """

    params: dict[str, np.ndarray]
    apply_fn: Callable[[Mapping[str, Any], Any], Any]


def network(path: str | os.PathLike[str], *, max_bytes: int = _limits.MAX_BYTES) -> Network:
    """Reads a network from ONNX, TFLite, Keras or ``torch.export.save`` (``.pt2``); safe on hostile files.

    No format's package is needed, and nothing in the file runs as code: the graph is a list of operations, and
    each is looked up in a table of functions of JAX. The format is detected from the content.

    The function takes images as the graph does: PyTorch's take [B C H W], those of Keras and TFLite [B H W C], of the
    size and in the scale for which the network was made. It returns the graph's first result. A softmax at the end is
    left out, so that the result is logits; in a ``.pt2`` it stays. A graph exported for a fixed number of images takes
    multiples of it. A quantised TFLite graph takes images and computes in real numbers.

    Args:
      path: of the file.
      max_bytes: limit on the file's size and on the total size of its tensors.

    Raises:
      Unreadable: when the file cannot be read safely, holds weights alone, or takes more than images.
      SmarkError: when an operator is not supported; later, when the function is called, for a setting of an operator
        that is not, for missing weights, and for images of another shape.

    Examples:
      >>> from smark_jax import embedding, files  # doctest: +SKIP
      >>> params, apply_fn = files.network("classifier.onnx")  # doctest: +SKIP
      >>> logits = apply_fn(params, images)  # doctest: +SKIP
    """
    with reading.naming(path):
        source = _sources.opened(path, max_bytes)
        format = formats.of(source.data).name
        if format not in _KINDS:
            said = "Give weights alone to files.read, and write their network as a function of JAX."
            raise Unreadable(f"it is {format}, and holds no network", said)
        load, operators = _KINDS[format]
        found = load(source, max_bytes)
        table = importlib.import_module(f"smark_jax.files.networks.{operators}").OPERATORS
        return Network(found.params, graph.function(found, table))
