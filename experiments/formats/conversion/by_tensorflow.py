"""Keras' file as TensorFlow converts it: TFLite in float32, in float16, and in int8 as a whole."""
# pyright: reportMissingImports=false, reportMissingModuleSource=false

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from experiments.formats.conversion import FORMS, REFERENCE, arguments, convert


def main() -> None:
    _, _, folder = arguments()
    images = np.load(folder / REFERENCE)["images"]
    # Read anew for each: a converter may leave its traces in the network.
    model = lambda: tf.keras.models.load_model(folder / FORMS["Keras"], compile=False)  # noqa: E731

    def calibration() -> Iterator[list[np.ndarray]]:
        for image in images:
            yield [image[None]]

    def save(path: Path, kind: str) -> None:
        network = model()  # the converter refers to it weakly
        converter = tf.lite.TFLiteConverter.from_keras_model(network)
        if kind != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if kind == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if kind == "int8":
            converter.representative_dataset = calibration
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        path.write_bytes(converter.convert())

    kinds = ("float32", "float16", "int8")
    convert("by_tensorflow", {f"TFLite {kind}": lambda path, kind=kind: save(path, kind) for kind in kinds}, folder)


if __name__ == "__main__":
    main()
