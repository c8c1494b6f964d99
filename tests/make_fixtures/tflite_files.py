"""Makes tests/data/tflite: a small network in float32, float16, dynamic-range int8 and full int8, and their answers.

Run it where TensorFlow 2.20 is installed: ``python tests/make_fixtures/tflite_files.py``. ``answers.npz`` holds images
and, by the name of a file, the probabilities that TensorFlow's interpreter computes with its reference kernels; those
of ``keras`` are the network's before it was converted.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

FOLDER = Path(__file__).parents[1] / "data" / "tflite"
layers = tf.keras.layers


def network(rng: np.random.Generator) -> tf.keras.Model:
    """Convolutions with norms, a depthwise one, a residual sum, both pools, squeeze and excitation, a softmax."""
    images = tf.keras.Input((16, 12, 3))
    x = layers.Rescaling(1 / 127.5, -1)(images)
    x = layers.Conv2D(8, 3, 2, "same", use_bias=False)(x)
    x = layers.ReLU(6)(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, 1, "same", use_bias=False)(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
    gate = layers.Conv2D(8, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="relu")(gate))
    x = layers.Add()([x, layers.Multiply()([y, gate])])
    x = layers.Concatenate()([layers.MaxPooling2D(3, 2, "same")(x), layers.AveragePooling2D(3, 2, "same")(x)])
    x = layers.Conv2D(12, 3, 1, "valid", activation="relu")(x)
    x = layers.Dense(10)(layers.Flatten()(x))
    model = tf.keras.Model(images, layers.Softmax()(x))
    for weight in model.weights:
        low, width = (0.5, 1.0) if weight.name in ("gamma", "moving_variance") else (0, 0)
        shape = tuple(weight.shape)
        spread = (2 / max(np.prod(shape[:-1]), 1)) ** 0.5 if len(shape) > 1 else 0.2
        weight.assign(low + width * rng.random(shape) if width else spread * rng.normal(size=shape))
    return model


def answer(content: bytes, image: np.ndarray) -> np.ndarray:
    """What the interpreter computes of an image; a quantised file takes and gives quantised numbers."""
    resolver = tf.lite.experimental.OpResolverType.BUILTIN_REF
    interpreter = tf.lite.Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    if given["dtype"] == np.int8:
        scale, zero = given["quantization"]
        image = np.round(image / scale + zero).astype(np.int8)
    interpreter.set_tensor(given["index"], image)
    interpreter.invoke()
    found = interpreter.get_tensor(result["index"])
    scale, zero = result["quantization"]
    return (found.astype(np.float32) - zero) * np.float32(scale) if result["dtype"] == np.int8 else found


def main() -> None:
    """Writes all files."""
    rng = np.random.default_rng(0)
    model = network(rng)
    images = rng.integers(0, 256, (64, 1, 16, 12, 3)).astype(np.float32)

    def calibration() -> Iterator[list[np.ndarray]]:
        for image in images:
            yield [image]

    FOLDER.mkdir(parents=True, exist_ok=True)
    shown = images[:4, 0]
    answers = {"images": shown.astype(np.uint8), "keras": model(shown).numpy()}
    for name in ("float32", "float16", "dynamic", "int8"):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if name != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if name == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if name == "int8":
            converter.representative_dataset = calibration
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.int8
        content = converter.convert()
        (FOLDER / f"{name}.tflite").write_bytes(content)
        answers[name] = np.concatenate([answer(content, image[None]) for image in shown])
    np.savez_compressed(FOLDER / "answers.npz", **answers)


if __name__ == "__main__":
    main()
