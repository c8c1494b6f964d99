"""Files that other libraries make of a copy, each library in a process of its own; nothing here imports smark_jax.

A module ``by_LIBRARY`` is run as ``python -m experiments.formats.conversion.by_LIBRARY NETWORK COPY FOLDER``. It writes
what it can of :data:`FORMS` into the folder, and ``by_LIBRARY.json`` with the reason for each form that it cannot.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

MAKERS = {
    "by_torch": {
        "safetensors": "state.safetensors",
        "state dict": "state.pt",
        "TorchScript": "traced.pt",
        "torch.export": "exported.pt2",
        "ONNX, older exporter": "older.onnx",
        "ONNX, dynamo": "dynamo.onnx",
        "TFLite, LiteRT Torch": "litert.tflite",
    },
    "by_onnxruntime": {
        "ONNX, norms folded": "folded.onnx",
        "ONNX, in blocks": "blocks.onnx",
        "ONNX, int8 QDQ": "qdq.onnx",
    },
    "by_keras": {"Keras": "model.keras", "Keras h5": "model.h5"},
    "by_tensorflow": {f"TFLite {kind}": f"{kind}.tflite" for kind in ("float32", "float16", "int8")},
}
"""Each library's forms of suspects, and their files in the folder."""
FORMS = {form: name for makes in MAKERS.values() for form, name in makes.items()}

REFERENCE = "reference.npz"
"""Images [B H W C] and the logits that the copy gives them in its own runtime."""

UNFOLDED = "unfolded.onnx"
"""ONNX whose batch norms are not folded yet, where somebody made it."""

EXPORTED = "exported.onnx"
"""What :mod:`export` makes."""

SAME = 1e-3
"""A conversion whose logits differ by more than this share of their largest size is no copy of the function."""

_REASON = 200


def convert(library: str, makers: Mapping[str, Callable[[Path], None]], folder: Path) -> None:
    """Makes the forms, each as far as it goes, and writes down why others failed."""
    reasons: dict[str, str] = {}
    for form, make in makers.items():
        try:
            make(folder / FORMS[form])
        except Exception as error:  # of any library; the other forms can still be made
            (folder / FORMS[form]).unlink(missing_ok=True)
            reasons[form] = reason(error)
    (folder / f"{library}.json").write_text(json.dumps(reasons))


def reason(error: BaseException) -> str:
    """An error in one line, without the folders of this machine."""
    text = re.sub(r"/\S*/", "", " ".join(str(error).split())) or "no message"
    return f"{type(error).__name__}: {text}"[:_REASON]


def arguments() -> tuple[str, Path, Path]:
    """The network's name, the copy and the folder."""
    network, copy, folder = sys.argv[1:]
    return network, Path(copy), Path(folder)
