"""ONNX files as onnxruntime rewrites them: with batch norms folded, in blocks of channels, in int8 with QDQ pairs."""
# pyright: reportMissingImports=false, reportMissingModuleSource=false

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import quantization

from experiments.formats.conversion import FORMS, REFERENCE, UNFOLDED, arguments, convert


class _Calibration(quantization.CalibrationDataReader):
    """Images, one at a time, as onnxruntime asks for them."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self._left: Iterator[dict[str, Any]] = ({name: image[None]} for image in images)

    def get_next(self) -> dict[str, Any]:
        """The next one; None after the last."""
        return next(self._left, None)  # pyright: ignore[reportReturnType]


def _optimised(source: Path, path: Path, level: Any) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def quantised(source: Path, images: np.ndarray, path: Path) -> None:
    """Writes a network in int8, with scales found on images [B H W C] in the network's form."""
    given = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0]
    if given.shape[1] == images.shape[3]:  # channels first
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    reader = _Calibration(given.name, images)
    quantization.quantize_static(source, path, reader, quantization.QuantFormat.QDQ, per_channel=True)


def main() -> None:
    _, copy, folder = arguments()
    images = np.load(folder / REFERENCE)["images"]
    exported = [folder / FORMS[form] for form in ("ONNX, older exporter", "ONNX, dynamo")]
    plain = [path for path in (copy, *exported) if path.suffix == ".onnx" and path.exists()]
    unfolded = [path for path in (folder / UNFOLDED, *plain) if path.exists()]
    levels = onnxruntime.GraphOptimizationLevel
    forms = {
        "ONNX, norms folded": lambda path: _optimised(unfolded[0], path, levels.ORT_ENABLE_EXTENDED),
        "ONNX, in blocks": lambda path: _optimised(unfolded[0], path, levels.ORT_ENABLE_ALL),
        "ONNX, int8 QDQ": lambda path: quantised(plain[0], images, path),
    }
    if not plain:
        raise SystemExit("no exporter of PyTorch made an ONNX file of it")
    convert("by_onnxruntime", forms, folder)


if __name__ == "__main__":
    main()
