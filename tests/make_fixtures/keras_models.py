"""Makes tests/data/keras: small networks as Keras 3 saves them, and what it computes.

Run it with Keras 3 and JAX: ``KERAS_BACKEND=jax python tests/make_fixtures/keras_models.py``.
The archives of numbers hold the images, the logits, and each weight by the name that Keras shows.
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

FOLDER = Path(__file__).parents[1] / "data/keras"


def convolutional() -> keras.Model:
    """A functional model with layers that are nested, shared and merged."""
    images = keras.Input((12, 10, 3), name="images")
    x = layers.ZeroPadding2D(((1, 0), (0, 2)))(layers.Rescaling(1 / 127.5, offset=-1)(images))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(max_value=6.0)(layers.BatchNormalization(name="bn")(x))
    shared = layers.Conv2D(8, 1, groups=2, activation="silu", name="shared")
    y = layers.DepthwiseConv2D(3, padding="same")(shared(x))
    y = layers.BatchNormalization(scale=False, name="unscaled")(y)
    z = layers.SeparableConv2D(8, 3, padding="same", activation="gelu")(shared(y))
    block = [layers.Conv2D(8, (2, 1), dilation_rate=(1, 2), name="inside"), layers.PReLU(shared_axes=[1, 2])]
    x = keras.Sequential([keras.Input((7, 6, 8)), *block], name="block")(layers.Add()([y, z]))
    x = layers.Concatenate()([layers.MaxPooling2D(3, 2, "same")(x), layers.AveragePooling2D(3, 2, "same")(x)])
    x = layers.Flatten()(x)
    return keras.Model(images, layers.Dense(5, activation="softmax", name="logits")(x), name="convolutional")


def attentive() -> keras.Model:
    """A functional model with attention, other norms and operations on tensors."""
    images = keras.Input((8, 6, 4), name="images")
    x = layers.GroupNormalization(2)(images)
    gate = layers.Conv2D(4, 1, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Multiply()([x, gate])
    tokens = layers.Reshape((-1, 8))(x)
    normed = layers.LayerNormalization(epsilon=1e-6)(tokens)
    tokens = tokens * 0.5 + layers.MultiHeadAttention(2, 5, name="attention")(normed, normed)
    x = ops.mean(layers.Dropout(0.2)(tokens[:, :5]), axis=1)
    x = layers.Dense(5, name="logits")(layers.Dense(6, activation="leaky_relu")(x))
    return keras.Model(images, layers.Activation("softmax")(x), name="attentive")


def quantised() -> keras.Model:
    """A sequential model with an int8 layer."""
    parts = [layers.Conv2D(2, 3, name="conv"), layers.Flatten(), layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((6, 6, 2)), *parts], name="quantised")
    expected = {weight.path.removeprefix("quantised/"): np.asarray(weight) for weight in model.weights}
    np.savez(FOLDER / "int8.npz", **expected)
    model.quantize("int8")
    return model


def save(model: keras.Model, name: str, rng: np.random.Generator) -> None:
    """Saves a network with random weights."""
    for weight in model.weights:
        low = 0.5 if "variance" in weight.path else -0.5
        weight.assign(rng.uniform(low, low + 1, weight.shape))
    images = rng.uniform(0, 255, (3, *model.input.shape[1:])).astype(np.float32)
    model.save(FOLDER / f"{name}.keras")
    expected = {weight.path: np.asarray(weight) for weight in model.weights}
    model.layers[-1].activation = keras.activations.linear
    np.savez(FOLDER / f"{name}.npz", images=images, logits=np.asarray(model(images, training=False)), **expected)


def main() -> None:
    """Writes the files."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    save(convolutional(), "convolutional", rng)
    save(attentive(), "attentive", rng)
    keras.models.load_model(FOLDER / "convolutional.keras").save(FOLDER / "older.h5")
    quantised().save(FOLDER / "int8.keras")


if __name__ == "__main__":
    main()
