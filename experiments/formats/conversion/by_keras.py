"""A copy as Keras 3 saves it; and what Keras has no other library for, in PyTorch's forms by Keras' own back end.

A copy that is not Keras' own is moved there by hand. Run it with ``KERAS_BACKEND=torch``.
"""

from pathlib import Path

import keras
import numpy as np
import torch

from experiments.formats.conversion import REFERENCE, SAME, arguments, by_torch, convert, keras_networks


def _state(copy: Path) -> dict[str, np.ndarray]:
    """The copy's leaves, as its own library reads them."""
    if copy.suffix != ".onnx":
        return {name: leaf.numpy() for name, leaf in torch.load(copy, weights_only=True).items()}
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(copy).graph
    leaves = {leaf.name: numpy_helper.to_array(leaf) for leaf in graph.initializer}
    used = [name for node in graph.node if node.op_type in ("Conv", "MatMul", "Add") for name in node.input]
    return {name: leaves[name] for name in used if name in leaves}


def _reference(copy: Path, model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Images, and what the copy's own runtime makes of them."""
    images = np.random.default_rng(0).uniform(-1, 1, (8, *model.input_shape[1:])).astype(np.float32)
    if copy.suffix != ".onnx":
        return images, _logits(model, images)
    import onnxruntime

    session = onnxruntime.InferenceSession(copy, providers=["CPUExecutionProvider"])
    return images, np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def _logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict(images, verbose=0))


def main() -> None:
    name, copy, folder = arguments()
    model = keras.saving.load_model(copy, compile=False) if copy.suffix == ".hdf5" else None
    own = model is not None or copy.suffix == ".onnx"
    model = model or keras_networks.network(name, _state(copy))
    if own:
        images, logits = _reference(copy, model)
        np.savez(folder / REFERENCE, images=images, logits=logits)
    kept = np.load(folder / REFERENCE)
    images, logits = kept["images"], kept["logits"]
    differs = np.abs(_logits(model, images) - logits).max() / np.abs(logits).max()
    if differs > SAME:
        raise SystemExit(f"the network in Keras gives other logits than the copy: a share of {differs:.2g}")
    forms = {"Keras": model.save, "Keras h5": model.save}
    if own:
        for part in model.parameters():
            part.requires_grad_(False)
        forms |= by_torch.makers(model.eval(), torch.tensor(images[:1]))
    convert("by_keras", forms, folder)


if __name__ == "__main__":
    main()
