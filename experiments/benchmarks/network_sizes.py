"""The leaves of networks of real size by name, with the shape of each array; without the networks."""

import functools
from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


def _conv(shapes: Shapes, name: str, size: int, inputs: int, outputs: int) -> None:
    """Adds a convolution and the norm after it."""
    shapes[f"{name}/kernel"] = (size, size, inputs, outputs)
    shapes[f"{name}/norm/scale"] = shapes[f"{name}/norm/bias"] = (outputs,)


def resnet50(classes: int = 1000) -> Shapes:
    """ResNet-50 (He et al. 2016) for images of 224 x 224: 25,557,032 weights."""
    shapes: Shapes = {}
    conv = functools.partial(_conv, shapes)
    conv("stem", 7, 3, 64)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            name = f"stage_{stage}/block_{block}"
            conv(f"{name}/reduce", 1, inputs, width)
            conv(f"{name}/conv", 3, width, width)
            conv(f"{name}/expand", 1, width, 4 * width)
            if block == 0:
                conv(f"{name}/shortcut", 1, inputs, 4 * width)
            inputs = 4 * width
    return shapes | {"head/kernel": (inputs, classes), "head/bias": (classes,)}


def resnet18(classes: int = 1000) -> Shapes:
    """ResNet-18 (He et al. 2016) for images of 224 x 224: 11,689,512 weights."""
    shapes: Shapes = {}
    conv = functools.partial(_conv, shapes)
    conv("stem", 7, 3, 64)
    inputs = 64
    for stage in range(4):
        width = 64 * 2**stage
        for block in range(2):
            name = f"stage_{stage}/block_{block}"
            conv(f"{name}/conv_0", 3, inputs, width)
            conv(f"{name}/conv_1", 3, width, width)
            if inputs != width:
                conv(f"{name}/shortcut", 1, inputs, width)
            inputs = width
    return shapes | {"head/kernel": (inputs, classes), "head/bias": (classes,)}


def over_parametrised() -> Shapes:
    """A convolution and a dense layer with 12,544 inputs: 11,276,288 weights."""
    return {"conv": (3, 3, 64, 64), "dense": (12_544, 896)}


def vit_b16(classes: int = 1000) -> Shapes:
    """ViT-B/16 (Dosovitskiy et al. 2021) for images of 224 x 224: 86,567,656 weights."""
    return _vit(768, 3072, 12, classes)


def vit_l16(classes: int = 1000) -> Shapes:
    """ViT-L/16, likewise: 304,326,632 weights."""
    return _vit(1024, 4096, 24, classes)


def _vit(width: int, hidden: int, layers: int, classes: int) -> Shapes:
    shapes: Shapes = {
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "class_token": (1, 1, width),
        "positions": (1, 197, width),
    }
    for layer in range(layers):
        for norm in ("norm_0", "norm_1"):
            shapes[f"layer_{layer}/{norm}/scale"] = shapes[f"layer_{layer}/{norm}/bias"] = (width,)
        for name, inputs, outputs in (
            ("query", width, width),
            ("key", width, width),
            ("value", width, width),
            ("out", width, width),
            ("mlp_0", width, hidden),
            ("mlp_1", hidden, width),
        ):
            shapes[f"layer_{layer}/{name}/kernel"] = (inputs, outputs)
            shapes[f"layer_{layer}/{name}/bias"] = (outputs,)
    shapes["norm/scale"] = shapes["norm/bias"] = (width,)
    return shapes | {"head/kernel": (width, classes), "head/bias": (classes,)}


def layers(num_weights: int) -> Shapes:
    """Eight layers of ``num_weights`` weights in all."""
    sizes = [num_weights // 8 + (num_weights % 8 if i == 0 else 0) for i in range(8)]
    return {f"layer_{i}": (size,) for i, size in enumerate(sizes)}


NAMED: dict[str, Callable[[], Shapes]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b16,
    "ViT-L/16": vit_l16,
}
