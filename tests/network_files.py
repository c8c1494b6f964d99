"""Writes networks as ONNX and as PyTorch's exported programs by hand, from the formats' descriptions alone.

It also breaks networks' files of any format, and says how readers end on them.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from smark_jax import errors, files

# TensorProto.DataType and AttributeProto.AttributeType of ONNX; ScalarType of PyTorch.
ONNX_DTYPES = {"f4": 1, "u1": 2, "i1": 3, "i4": 6, "i8": 7, "b1": 9, "f2": 10, "f8": 11}
TORCH_DTYPES = {"u1": 1, "i8": 5, "f2": 6, "f4": 7, "f8": 8}


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    found = b""
    while number > 0x7F:
        found, number = found + bytes([number & 0x7F | 0x80]), number >> 7
    return found + bytes([number])


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a message: a varint, a float32, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, array: np.ndarray) -> bytes:
    kind = 16 if array.dtype == ml_dtypes.bfloat16 else ONNX_DTYPES[array.dtype.str[1:]]
    dims = b"".join(field(1, n) for n in array.shape)
    return dims + field(2, kind) + field(8, name) + field(9, array.tobytes())


def attribute(name: str, value: Any) -> bytes:
    head = field(1, name)
    if isinstance(value, int):
        return head + field(3, value) + field(20, 2)
    if isinstance(value, float):
        return head + field(2, value) + field(20, 1)
    if isinstance(value, str):
        return head + field(4, value) + field(20, 3)
    if isinstance(value, np.ndarray):
        return head + field(5, tensor("", value)) + field(20, 4)
    if all(isinstance(number, int) for number in value):
        return head + b"".join(field(8, number) for number in value) + field(20, 7)
    return head + b"".join(field(7, number) for number in value) + field(20, 6)


class Step(NamedTuple):
    """A node: inputs and outputs by name."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    settings: Mapping[str, Any] = {}
    domain: str = ""


def node(step: Step) -> bytes:
    found = b"".join(field(1, name) for name in step.inputs) + b"".join(field(2, name) for name in step.outputs)
    found += field(3, f"{step.op}_of_{step.outputs[0]}") + field(4, step.op)
    found += b"".join(field(5, attribute(name, value)) for name, value in step.settings.items())
    return found + field(7, step.domain)


def value_info(name: str, shape: Sequence[int | str], kind: int = 1) -> bytes:
    axes = b"".join(field(1, field(1, n) if isinstance(n, int) else field(2, n)) for n in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, axes)))


def onnx(
    steps: Sequence[Step],
    tensors: Mapping[str, np.ndarray],
    image: Sequence[int | str],
    output: str,
    version: int = 17,
    more: bytes = b"",
) -> bytes:
    """A model whose input is called ``x``; ``more`` are further fields of its graph."""
    graph = b"".join(field(1, node(step)) for step in steps) + field(2, "network")
    graph += b"".join(field(5, tensor(name, array)) for name, array in tensors.items())
    graph += field(11, value_info("x", image)) + field(12, field(1, output)) + more
    return field(1, 8) + field(2, "tests") + field(7, graph) + field(8, field(1, "") + field(2, version))


def onnx_in_two_files(weights: Path, tensors: Mapping[str, np.ndarray]) -> bytes:
    """A model of one node, which does not use its tensors; their numbers are written into the file ``weights``."""
    graph = b""
    with weights.open("wb") as file:
        for name, leaf in tensors.items():
            place = {"location": weights.name, "offset": str(file.tell()), "length": str(leaf.nbytes)}
            entries = b"".join(field(13, field(1, key) + field(2, value)) for key, value in place.items())
            head = b"".join(field(1, n) for n in leaf.shape) + field(2, ONNX_DTYPES[leaf.dtype.str[1:]])
            graph += field(5, head + field(8, name) + entries + field(14, 1))
            file.write(leaf.tobytes())
    return onnx([Step("Relu", ["x"], ["y"])], {}, [1, 8], "y", more=graph)


def exported(
    steps: Sequence[tuple[str, Sequence[Any], str]],
    parameters: Mapping[str, np.ndarray],
    buffers: Mapping[str, np.ndarray],
    image: Sequence[int | str],
    output: str,
    change: Mapping[str, Any] | None = None,
) -> bytes:
    """An exported program whose input is called ``x``.

    Args:
      steps: operator with its overload, arguments, and the result's name. Arguments are those of the schema's JSON, and
        a text stands for a tensor.
      parameters: by name; in the graph they are called the same.
      buffers: likewise.
      image: the input's shape.
      output: the name of the result.
      change: members to replace, by name below the root; None leaves one out.
    """
    tensors = {**parameters, **buffers}
    config = {
        name: {
            "path_name": f"weight_{number}",
            "is_param": name in parameters,
            "use_pickle": False,
            "tensor_meta": {
                "dtype": TORCH_DTYPES[array.dtype.str[1:]],
                "sizes": [{"as_int": n} for n in array.shape],
                "strides": [{"as_int": step // array.itemsize} for step in np.ascontiguousarray(array).strides],
                "storage_offset": {"as_int": 0},
            },
        }
        for number, (name, array) in enumerate(tensors.items())
    }
    nodes = [
        {
            "target": f"torch.ops.aten.{target}",
            "inputs": [
                {"name": f"argument_{n}", "arg": {"as_tensor": {"name": a}} if isinstance(a, str) else a, "kind": 1}
                for n, a in enumerate(arguments)
            ],
            "outputs": [{"as_tensor": {"name": result}}],
        }
        for target, arguments, result in steps
    ]
    specs = [{"parameter": {"arg": {"name": name}, "parameter_name": name}} for name in parameters]
    specs += [{"buffer": {"arg": {"name": name}, "buffer_name": name}} for name in buffers]
    specs += [{"user_input": {"arg": {"as_tensor": {"name": "x"}}}}]
    sizes = [{"as_int": n} if isinstance(n, int) else {"as_expr": {"expr_str": n}} for n in image]
    graph = {"nodes": nodes, "outputs": [{"as_tensor": {"name": output}}], "tensor_values": {"x": {"sizes": sizes}}}
    program = {"graph_module": {"graph": graph, "signature": {"input_specs": specs}}}
    members: dict[str, Any] = {
        "models/model.json": json.dumps(program).encode(),
        "data/weights/model_weights_config.json": json.dumps({"config": config}).encode(),
        "data/constants/model_constants_config.json": b'{"config": {}}',
        **{f"data/weights/weight_{n}": array.tobytes() for n, array in enumerate(tensors.values())},
        **(change or {}),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(f"net/{name}", content)
    return file.getvalue()


def ints(*numbers: int) -> dict[str, Any]:
    return {"as_ints": list(numbers)}


class Classifier(NamedTuple):
    """A small convolutional network: strides, groups, batch norm, a residual sum, pooling, a dense layer."""

    weights: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]

    def onnx(self, batch: int | str = "batch", softmax: bool = False, quantised: bool = False) -> bytes:
        steps = [
            Step(
                "Conv", ["x", "conv.weight"], ["a"], {"strides": [2, 1], "pads": [1, 0, 0, 1], "kernel_shape": [3, 2]}
            ),
            Step("BatchNormalization", ["a", "bn.weight", "bn.bias", "m", "v"], ["b"], {"epsilon": 1e-3}),
            Step("Relu", ["b"], ["c"]),
            Step("Conv", ["c", "deep.weight", "deep.bias"], ["d"], {"group": 4, "pads": [1, 1, 1, 1]}),
            Step("Add", ["d", "c"], ["e"]),
            Step("MaxPool", ["e"], ["f"], {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [0, 1, 0, 1]}),
            Step("Flatten", ["f"], ["g"]),
            Step("Gemm", ["g", "fc.weight", "fc.bias"], ["logits"], {"transB": 1}),
        ]
        steps += [Step("Softmax", ["logits"], ["chances"], {"axis": 1})] if softmax else []
        tensors = self.weights | {"m": self.statistics["bn.running_mean"], "v": self.statistics["bn.running_var"]}
        if quantised:  # the dense kernel, by steps of each of its rows
            rows = tensors.pop("fc.weight")
            scales = (np.abs(rows).max(1) / 127).astype(np.float32)
            parts = ["fc.weight_quantized", "fc.weight_scale", "fc.weight_zero_point"]
            whole = np.rint(rows / scales[:, None]).astype(np.int8)
            tensors |= dict(zip(parts, [whole, scales, np.zeros(5, np.int8)], strict=True))
            steps.insert(0, Step("DequantizeLinear", parts, ["fc.weight"], {"axis": 0}))
        return onnx(steps, tensors, [batch, 2, 6, 5], "chances" if softmax else "logits")

    def exported(self, batch: int | str = "s0", **change: Any) -> bytes:
        none, flag = {"as_none": True}, {"as_bool": False}
        norm = ["a", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", flag, {"as_float": 0.1}]
        steps = [
            ("constant_pad_nd.default", ["x", ints(0, 1, 1, 0)], "p"),
            ("conv2d.default", ["p", "conv.weight", none, ints(2, 1)], "a"),
            ("batch_norm.default", [*norm, {"as_float": 1e-3}, flag], "b"),
            ("relu_.default", ["b"], "c"),
            (
                "conv2d.default",
                ["c", "deep.weight", "deep.bias", ints(1, 1), ints(1, 1), ints(1, 1), {"as_int": 4}],
                "d",
            ),
            ("add.Tensor", ["d", "b"], "e"),  # b was changed in place
            ("max_pool2d.default", ["e", ints(2, 3), ints(2, 2), ints(0, 1)], "f"),
            ("flatten.using_ints", ["f", {"as_int": 1}], "g"),
            ("linear.default", ["g", "fc.weight", "fc.bias"], "logits"),
        ]
        return exported(steps, self.weights, self.statistics, [batch, 2, 6, 5], "logits", change)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """The same in loops over single numbers, in float64."""
        weights = {name: array.astype(np.float64) for name, array in (self.weights | self.statistics).items()}
        found = []
        for image in images.astype(np.float64):
            a = loops(np.pad(image, ((0, 0), (1, 0), (0, 1))), weights["conv.weight"], (2, 1), 1)
            spread = np.sqrt(weights["bn.running_var"] + 1e-3)
            b = [(x - m) / s for x, m, s in zip(a, weights["bn.running_mean"], spread, strict=True)]
            c = np.stack([x * w + z for x, w, z in zip(b, weights["bn.weight"], weights["bn.bias"], strict=True)])
            c = np.where(c > 0, c, 0)
            d = loops(np.pad(c, ((0, 0), (1, 1), (1, 1))), weights["deep.weight"], (1, 1), 4)
            e = np.pad(d + weights["deep.bias"][:, None, None] + c, ((0, 0), (0, 0), (1, 1)), constant_values=-np.inf)
            rows, columns = (e.shape[1] - 2) // 2 + 1, (e.shape[2] - 3) // 2 + 1
            f = [
                [[e[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 3].max() for j in range(columns)] for i in range(rows)]
                for k in range(4)
            ]
            found.append(weights["fc.weight"] @ np.ravel(f) + weights["fc.bias"])
        return np.stack(found)


def classifier(seed: int = 0) -> Classifier:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = {
        "conv.weight": draw(4, 2, 3, 2), "bn.weight": draw(4), "bn.bias": draw(4), "deep.weight": draw(4, 1, 3, 3),
        "deep.bias": draw(4), "fc.weight": draw(5, 12), "fc.bias": draw(5),
    }  # fmt: skip
    return Classifier(weights, {"bn.running_mean": draw(4), "bn.running_var": draw(4) ** 2 + np.float32(0.5)})


def loops(image: np.ndarray, kernel: np.ndarray, strides: tuple[int, int], groups: int) -> np.ndarray:
    """A convolution of one image [C H W], without padding."""
    outputs, inputs, height, width = kernel.shape
    rows, columns = (image.shape[1] - height) // strides[0] + 1, (image.shape[2] - width) // strides[1] + 1
    found = np.zeros((outputs, rows, columns))
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        for i in range(rows):
            for j in range(columns):
                top, left = i * strides[0], j * strides[1]
                piece = image[first : first + inputs, top : top + height, left : left + width]
                found[o, i, j] = sum(a * b for a, b in zip(piece.ravel(), kernel[o].ravel(), strict=True))
    return found


def ends_of_broken(
    content: bytes, written: Callable[[bytes], Path], number: int, first: int = 0
) -> set[tuple[str, str]]:
    """How ``files.read`` and ``files.network`` end on a file with other bytes from ``first`` on, or cut off there.

    Any other error than a refusal goes through, and a refusal of ``files.read`` must be printable.
    """
    rng, ends = np.random.default_rng(0), set()
    for one in range(number):
        broken = bytearray(content)
        if one % 3 == 0:
            broken = broken[: rng.integers(max(1, first), len(broken))]
        for place in rng.integers(first, len(broken), 1 + one % 4) if len(broken) > first else ():
            broken[place] = rng.integers(256)
        path = written(bytes(broken))
        for reader, refusal in ((files.read, errors.Unreadable), (files.network, errors.SmarkError)):
            try:
                reader(path)
                ends.add((reader.__name__, "read"))
            except refusal as error:
                assert str(error).isprintable() or reader is files.network
                ends.add((reader.__name__, "refused"))
    return ends
