"""TFLite: against its own interpreter, on files of TensorFlow's converter and on files written by hand."""

from pathlib import Path

import network_files
import numpy as np
import pytest
import tflite_files
from tflite_files import Step, byte, quantised, real, whole

from smark_jax import alignment, carriers, errors, files
from smark_jax.files.networks import tflite_schema

FOLDER = Path(__file__).parent / "data" / "tflite"
RNG = np.random.default_rng(3)


def PART(*shape):
    return RNG.normal(size=shape).astype(np.float32)


INTS = lambda *numbers: np.array(numbers, np.int32)  # noqa: E731
PIXELS, POSITIVE = PART(2, 7, 6, 4), np.abs(PART(2, 7, 6, 4)) + np.float32(0.1)
TOKENS = PART(2, 5, 8)
CONV, DEPTHWISE, POOL, DENSE, SOFTMAX, CONCAT, REDUCE, CAST = 1, 2, 5, 8, 9, 10, 27, 37
SAME, VALID = byte(0), byte(1)
NONE, RELU, RELU_N1, RELU6, TANH = map(byte, range(5))
KEEP = {0: byte(1)}


def conv(padding, height, width, activation, *dilations):
    """Fields of Conv2DOptions."""
    return {
        0: padding,
        1: whole(width),
        2: whole(height),
        3: activation,
        **dict(zip((5, 4), map(whole, dilations), strict=False)),
    }


def pool(padding, height, width, rows, columns, activation=NONE):
    """Fields of Pool2DOptions: strides, then the window."""
    return {0: padding, 1: whole(width), 2: whole(height), 3: whole(columns), 4: whole(rows), 5: activation}


# By name: operator, inputs, and the type and the fields of its options.
CASES = {
    "conv": ("CONV_2D", [PIXELS, PART(6, 3, 2, 4), PART(6)], CONV, conv(SAME, 2, 1, RELU)),
    "conv valid": ("CONV_2D", [PIXELS, PART(6, 3, 2, 4), PART(6)], CONV, conv(VALID, 2, 2, RELU6)),
    "conv dilated": ("CONV_2D", [PIXELS, PART(6, 3, 2, 4), PART(6)], CONV, conv(SAME, 1, 1, RELU_N1, 2, 3)),
    "conv grouped": ("CONV_2D", [PIXELS, PART(6, 3, 2, 2), PART(6)], CONV, conv(SAME, 1, 1, NONE)),
    "depthwise": (
        "DEPTHWISE_CONV_2D", [PIXELS, PART(1, 3, 2, 8), PART(8)], DEPTHWISE,
        {0: SAME, 1: whole(2), 2: whole(2), 3: whole(2), 4: RELU},
    ),
    "depthwise dilated": (
        "DEPTHWISE_CONV_2D", [PIXELS, PART(1, 3, 2, 4), PART(4)], DEPTHWISE,
        {0: VALID, 1: whole(1), 2: whole(1), 3: whole(1), 4: NONE, 5: whole(3), 6: whole(2)},
    ),
    "max pool": ("MAX_POOL_2D", [PIXELS], POOL, pool(SAME, 2, 1, 3, 2, RELU)),
    "max pool valid": ("MAX_POOL_2D", [PIXELS], POOL, pool(VALID, 2, 2, 3, 2)),
    "mean pool": ("AVERAGE_POOL_2D", [PIXELS], POOL, pool(SAME, 2, 2, 3, 3)),
    "mean pool valid": ("AVERAGE_POOL_2D", [PIXELS], POOL, pool(VALID, 1, 2, 2, 3)),
    "dense": ("FULLY_CONNECTED", [TOKENS, PART(3, 8), PART(3)], DENSE, {0: RELU}),
    "dense keep": ("FULLY_CONNECTED", [TOKENS, PART(3, 8), PART(3)], DENSE, {2: byte(1)}),
    "matmul": ("BATCH_MATMUL", [TOKENS, PART(2, 8, 3)], 101, {}),
    "matmul turned": ("BATCH_MATMUL", [TOKENS, PART(2, 3, 8)], 101, {1: byte(1)}),
    "add": ("ADD", [PIXELS, PART(4)], 11, {0: RELU}),
    "sub": ("SUB", [PIXELS, PART(7, 6, 4)], 28, {}),
    "mul": ("MUL", [PIXELS, PART(2, 1, 1, 4)], 21, {0: RELU6}),
    "div": ("DIV", [PIXELS, POSITIVE], 29, {}),
    "squared difference": ("SQUARED_DIFFERENCE", [PIXELS, PART(4)], 76, {}),
    "maximum": ("MAXIMUM", [PIXELS, PART(1)], 39, {}),
    "minimum": ("MINIMUM", [PIXELS, PART(4)], 39, {}),
    "pow": ("POW", [POSITIVE, POSITIVE[0, 0, 0]], 56, {}),
    "sqrt": ("SQRT", [POSITIVE], 0, {}),
    "rsqrt": ("RSQRT", [POSITIVE], 0, {}),
    "square": ("SQUARE", [PIXELS], 66, {}),
    "exp": ("EXP", [PIXELS], 33, {}),
    "log": ("LOG", [POSITIVE], 0, {}),
    "abs": ("ABS", [PIXELS], 78, {}),
    "neg": ("NEG", [PIXELS], 42, {}),
    "sin": ("SIN", [PIXELS], 0, {}),
    "cos": ("COS", [PIXELS], 83, {}),
    "floor": ("FLOOR", [PIXELS], 0, {}),
    "ceil": ("CEIL", [PIXELS], 0, {}),
    "round": ("ROUND", [PIXELS], 0, {}),
    "relu": ("RELU", [PIXELS], 0, {}),
    "relu6": ("RELU6", [4 * PIXELS], 0, {}),
    "relu from -1 to 1": ("RELU_N1_TO_1", [PIXELS], 0, {}),
    "leaky relu": ("LEAKY_RELU", [PIXELS], 75, {0: real(0.3)}),
    "prelu": ("PRELU", [PIXELS, PART(1, 1, 4)], 0, {}),
    "elu": ("ELU", [PIXELS], 0, {}),
    "gelu": ("GELU", [PIXELS], 116, {}),
    "gelu by tanh": ("GELU", [PIXELS], 116, {0: byte(1)}),
    "hard swish": ("HARD_SWISH", [4 * PIXELS], 91, {}),
    "logistic": ("LOGISTIC", [PIXELS], 0, {}),
    "tanh": ("TANH", [PIXELS], 0, {}),
    "softmax": ("SOFTMAX", [TOKENS], SOFTMAX, {0: real(0.5)}),
    "log softmax": ("LOG_SOFTMAX", [TOKENS], 36, {}),
    "unit vectors": ("L2_NORMALIZATION", [PIXELS], 12, {}),
    "mean": ("MEAN", [PIXELS, INTS(1, 2)], REDUCE, {}),
    "mean keep": ("MEAN", [PIXELS, INTS(-1)], REDUCE, KEEP),
    "sum": ("SUM", [PIXELS, INTS(1)], REDUCE, KEEP),
    "largest": ("REDUCE_MAX", [PIXELS, INTS(2, 3)], REDUCE, {}),
    "smallest": ("REDUCE_MIN", [PIXELS, INTS(0)], REDUCE, {}),
    "product": ("REDUCE_PROD", [PIXELS, INTS(3)], REDUCE, {}),
    "reshape": ("RESHAPE", [PIXELS, INTS(2, -1)], 0, {}),
    "reshape by option": ("RESHAPE", [PIXELS], 17, {0: INTS(4, -1)}),
    "transpose": ("TRANSPOSE", [PIXELS, INTS(0, 3, 1, 2)], 26, {}),
    "expand": ("EXPAND_DIMS", [TOKENS, INTS(1)], 52, {}),
    "squeeze": ("SQUEEZE", [PART(2, 1, 5, 1)], 30, {0: INTS(1)}),
    "concatenation": ("CONCATENATION", [PIXELS, PART(2, 7, 6, 3)], CONCAT, {0: whole(-1)}),
    "pack": ("PACK", [TOKENS, TOKENS[::-1].copy()], 59, {0: whole(2), 1: whole(1)}),
    "unpack": ("UNPACK", [TOKENS], 64, {0: whole(5), 1: whole(1)}),
    "split": ("SPLIT", [INTS(3), PIXELS], 35, {0: whole(2)}),
    "split by sizes": ("SPLIT_V", [TOKENS, INTS(2, -1), INTS(1)], 79, {0: whole(2)}),
    "slice": ("SLICE", [PIXELS, INTS(0, 1, 2, 0), INTS(2, 3, -1, 4)], 48, {}),
    "strided slice": (
        "STRIDED_SLICE", [PIXELS, INTS(0, 1, 5, 1), INTS(9, 6, 0, 2), INTS(1, 2, -2, 1)], 32,
        {0: whole(1), 1: whole(1), 4: whole(8)},
    ),
    "strided slice, new axis": (
        "STRIDED_SLICE", [TOKENS, INTS(0, 0, 2), INTS(0, 0, 6), INTS(1, 1, 1)], 32, {2: whole(1), 3: whole(2)},
    ),
    "gather": ("GATHER", [PIXELS, INTS(2, 0)], 23, {0: whole(2)}),
    "broadcast": ("BROADCAST_TO", [PART(1, 5, 1), INTS(2, 5, 3)], 104, {}),
    "tile": ("TILE", [TOKENS, INTS(1, 2, 3)], 51, {}),
    "space to batch": ("SPACE_TO_BATCH_ND", [PIXELS, INTS(2, 3), INTS(1, 2, 0, 3).reshape(2, 2)], 0, {}),
    "batch to space": ("BATCH_TO_SPACE_ND", [PART(12, 4, 3, 2), INTS(2, 3), INTS(1, 2, 0, 3).reshape(2, 2)], 0, {}),
    "pad": ("PAD", [PIXELS, INTS(0, 0, 1, 2, 0, 3, 0, 0).reshape(4, 2)], 22, {}),
    "pad by a number": ("PADV2", [PIXELS, INTS(0, 0, 1, 2, 0, 3, 0, 0).reshape(4, 2), np.float32([-3])], 43, {}),
    "pad by reflection": ("MIRROR_PAD", [PIXELS, INTS(0, 0, 1, 2, 2, 3, 0, 0).reshape(4, 2)], 77, {}),
    "pad by symmetry": ("MIRROR_PAD", [PIXELS, INTS(0, 0, 1, 2, 2, 3, 0, 0).reshape(4, 2)], 77, {0: byte(1)}),
    "select": ("SELECT_V2", [PIXELS > 0, PIXELS, PART(4)], 98, {}),
    "select whole": ("SELECT", [PIXELS > 0, PIXELS, PIXELS[::-1].copy()], 47, {}),
    "equal": ("EQUAL", [PIXELS[:1], PIXELS], 53, {}),
    "not equal": ("NOT_EQUAL", [PIXELS[:1], PIXELS], 54, {}),
    "less": ("LESS", [PIXELS, PART(4)], 41, {}),
    "less or equal": ("LESS_EQUAL", [PIXELS[:1], PIXELS], 46, {}),
    "greater": ("GREATER", [PIXELS, PART(4)], 44, {}),
    "greater or equal": ("GREATER_EQUAL", [PIXELS[:1], PIXELS], 45, {}),
    "and": ("LOGICAL_AND", [PIXELS > 0, POSITIVE > 1], 61, {}),
    "or": ("LOGICAL_OR", [PIXELS > 0, POSITIVE > 1], 58, {}),
    "not": ("LOGICAL_NOT", [PIXELS > 0], 62, {}),
    "floor of a quotient": ("FLOOR_DIV", [PIXELS, POSITIVE], 65, {}),
    "rest": ("FLOOR_MOD", [PIXELS, POSITIVE], 72, {}),
    "sum of many": ("ADD_N", [TOKENS, PART(2, 5, 8), PART(2, 5, 8)], 82, {}),
    "fill": ("FILL", [INTS(2, 3), np.float32(0.5)], 68, {}),
    "sign": ("SIGN", [PIXELS], 122, {}),
    "relu from 0 to 1": ("RELU_0_TO_1", [PIXELS], 0, {}),
    "shape": ("SHAPE", [PIXELS], 55, {0: byte(2)}),
    "cast": ("CAST", [INTS(3, -2)], CAST, {0: byte(2), 1: byte(0)}),
    "dequantize": ("DEQUANTIZE", [PIXELS.astype(np.float16)], 0, {}),
}  # fmt: skip
CODES = {name: code for code, name in enumerate(tflite_schema.NAMES)}
TYPES = {"BOOL": byte(6), "INT32": byte(2)}
OF_BOOLS = (
    "EQUAL",
    "NOT_EQUAL",
    "LESS",
    "LESS_EQUAL",
    "GREATER",
    "GREATER_EQUAL",
    "LOGICAL_AND",
    "LOGICAL_OR",
    "LOGICAL_NOT",
)
VERSIONS = {"BROADCAST_TO": 2}


def step(op, inputs, outputs, fields=None, kind=0):
    return Step(CODES[op], inputs, outputs, fields or {}, kind, VERSIONS.get(op, 1))


def written(folder, content):
    path = folder / "network.tflite"
    path.write_bytes(content)
    return path


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


ANSWERS = dict(np.load(FOLDER / "answers.npz"))
IMAGES = ANSWERS.pop("images").astype(np.float32)
# Of probabilities: what float32 rounds, what activations of 8 bits round, and three steps of a result of 8 bits.
BOUNDS = {"float32": 1e-6, "float16": 1e-6, "dynamic": 3e-3, "int8": 3 / 256}


@pytest.mark.parametrize("name", BOUNDS)
def test_files_of_the_converter_compute_what_its_interpreter_does(name):
    params, apply_fn = files.network(FOLDER / f"{name}.tflite")
    found = softmax(np.asarray(apply_fn(params, IMAGES)))
    np.testing.assert_allclose(found, ANSWERS[name], atol=BOUNDS[name])
    assert np.abs(found - ANSWERS[name][::-1]).max() > 0.1  # the control: other images have other answers
    assert not alignment.trace_graph(apply_fn, params, IMAGES).unfollowed


def test_the_network_is_the_one_that_was_converted():
    params, apply_fn = files.network(FOLDER / "float32.tflite")
    np.testing.assert_allclose(softmax(np.asarray(apply_fn(params, IMAGES))), ANSWERS["keras"], atol=1e-5)


@pytest.mark.parametrize("name", BOUNDS)
def test_files_read_gives_the_leaves_of_the_network_and_the_rest_as_buffers(name):
    weights, params = files.read(FOLDER / f"{name}.tflite"), files.network(FOLDER / f"{name}.tflite").params
    assert weights.format == "tflite" and len(params) == 12
    assert weights.leaves.keys() - params.keys() == {n for n in weights.leaves if n.startswith("buffers/")}
    for leaf, values in params.items():
        np.testing.assert_array_equal(values, weights.leaves[leaf])
        assert values.dtype == (np.float16 if name == "float16" else np.float32)


@pytest.mark.parametrize("name", BOUNDS)
def test_kernels_and_biases_carry_and_nothing_else_does(name):
    """The converter numbers its tensors, so that names tell nothing: the graph tells what is a weight."""
    leaves = files.read(FOLDER / f"{name}.tflite").leaves
    shapes = [leaf.shape for leaf in carriers.select(leaves).leaves]
    kernels = [(8, 3, 3, 3), (1, 3, 3, 8), (4, 1, 1, 8), (8, 1, 1, 4), (12, 3, 3, 16), (10, 24)]
    assert sorted(shapes) == sorted([*kernels, *[(kernel[-1] if kernel[0] == 1 else kernel[0],) for kernel in kernels]])


def test_the_four_files_hold_the_same_kernels():
    """Which tensor is which is told by its shape; the steps of eight bits are wider where the bias asks for it."""
    kernels = {
        name: {leaf.shape: leaf.astype(np.float64) for leaf in files.read(FOLDER / f"{name}.tflite").leaves.values()}
        for name in BOUNDS
    }
    for shape, kernel in kernels["float32"].items():
        if len(shape) > 1:
            for name, bound in (("float16", 1e-3), ("dynamic", 0.02), ("int8", 0.02)):
                np.testing.assert_allclose(kernels[name][shape], kernel, atol=bound * np.abs(kernel).max())


def test_quantised_tensors_are_read_as_the_numbers_that_theirs_stand_for(tmp_path):
    rng = np.random.default_rng(1)
    by_channel = rng.integers(-128, 128, (3, 2, 2, 4)).astype(np.int8)
    scales, zeros = [0.5, 0.25, 2.0, 1.5], [0, 3, -7, 1]
    tensors = {
        "first axis": by_channel[..., 0], "last axis": by_channel, "bytes": np.array([[0, 7], [3, 255]], np.uint8),
        "bias": np.array([-(2**30), 5], np.int32), "plain": np.array([1, -2], np.int8),
        "nibbles": np.array([0x21, 0xF8, 0x07], np.uint8), "halves": np.array([1.5, -2], np.float16),
    }  # fmt: skip
    quantisation = {
        "first axis": quantised(scales[:3], zeros[:3]), "last axis": quantised(scales, zeros, 3),
        "bytes": quantised(0.1, 3), "bias": quantised(0.01, 0), "nibbles": quantised(0.5, 1),
    }  # fmt: skip
    change = {"nibbles": {0: INTS(5), 1: byte(17)}}
    content = tflite_files.tflite([step("RELU", ["x"], ["y"])], tensors, [1], ["y"], quantisation, change)
    weights = files.read(written(tmp_path, content))
    expected = {
        "first axis": [[[[(q - zeros[i]) * scales[i] for q in row] for row in plane] for plane in block]
                       for i, block in enumerate(by_channel[..., :1].astype(int))],
        "last axis": [[[[(int(q) - z) * s for q, z, s in zip(pixel, zeros, scales, strict=True)] for pixel in row]
                       for row in plane] for plane in by_channel],
        "bytes": [[-0.3, 0.4], [0.0, 25.2]],
        "bias": [-(2**30) * 0.01, 0.05],
        "nibbles": [(q - 1) * 0.5 for q in (1, 2, -8, -1, 7)],
        "halves": [1.5, -2.0],
        "buffers/plain": [1, -2],
    }  # fmt: skip
    assert weights.leaves.keys() == expected.keys()
    for name, numbers in expected.items():
        shape = tensors["first axis"].shape if name == "first axis" else np.shape(numbers)
        np.testing.assert_allclose(weights.leaves[name], np.reshape(numbers, shape), rtol=1e-6)
    kinds = {name: str(leaf.dtype) for name, leaf in weights.leaves.items()}
    assert (
        kinds.pop("halves") == "float16" and kinds.pop("buffers/plain") == "int8" and {*kinds.values()} == {"float32"}
    )


def changed(name, folder):
    """A file with other weights, its leaves, and the base's path."""
    base = FOLDER / f"{name}.tflite"
    rng, leaves = np.random.default_rng(2), files.read(base).leaves
    for leaf in carriers.select(leaves).leaves:
        if leaves[leaf.path].ndim > 1:
            noise = rng.normal(size=leaves[leaf.path].shape) * 0.1 * leaves[leaf.path].std()
            leaves[leaf.path] = (leaves[leaf.path] + noise).astype(leaves[leaf.path].dtype)
    files.write(folder / "copy.tflite", leaves, like=base)
    return folder / "copy.tflite", leaves, base


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_a_copy_is_its_base_but_for_the_weights(name, tmp_path):
    path, leaves, base = changed(name, tmp_path)
    ours, theirs = path.read_bytes(), base.read_bytes()
    assert len(ours) == len(theirs)
    places = [at for at in range(len(ours)) if ours[at] != theirs[at]]
    kernels = [leaf for leaf in leaves.values() if leaf.ndim > 1 and leaf.dtype.kind == "f"]
    assert 0.5 * sum(leaf.nbytes for leaf in kernels) < len(places) <= sum(leaf.nbytes for leaf in kernels)
    found = files.read(path).leaves
    assert found.keys() == leaves.keys() and all((found[n] == leaf).all() for n, leaf in leaves.items())


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_a_copy_runs_in_the_interpreter(name, tmp_path):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    path, leaves, base = changed(name, tmp_path)
    interpreter = litert.Interpreter(model_path=str(path))
    interpreter.resize_tensor_input(0, IMAGES.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, IMAGES)
    interpreter.invoke()
    answers = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    params, apply_fn = files.network(base)
    here = softmax(np.asarray(apply_fn({name: leaves[name] for name in params}, IMAGES)))
    np.testing.assert_allclose(here, answers, atol=1e-5)
    assert np.abs(answers - ANSWERS[name]).max() > 1e-3  # the control: the copy is another network


def test_quantised_weights_are_not_written(tmp_path):
    leaves = files.read(FOLDER / "dynamic.tflite").leaves
    files.write(tmp_path / "same.tflite", leaves, like=FOLDER / "dynamic.tflite")
    assert (tmp_path / "same.tflite").read_bytes() == (FOLDER / "dynamic.tflite").read_bytes()
    name = next(name for name, leaf in leaves.items() if leaf.shape == (12, 3, 3, 16))
    leaves[name] = leaves[name] + 1
    with pytest.raises(errors.SmarkError, match=f"'{name}', which is quantised"):
        files.write(tmp_path / "other.tflite", leaves, like=FOLDER / "dynamic.tflite")


def test_tensors_over_the_same_bytes_are_one_leaf_or_do_not_carry(tmp_path):
    """The converter keeps equal tensors once: a mark on one would change the other."""
    weight, other = PART(3), np.zeros(3, np.float32)
    tensors = {"w": weight, "again": weight, "zeros": other, "axes": other.view(np.int32)}
    steps = [step("MUL", ["x", "w"], ["a"], {}, 21), step("ADD", ["a", "again"], ["b"], {}, 11)]
    steps.append(step("ADD", ["b", "zeros"], ["y"], {}, 11))
    buffer = {2: tflite_files.Number("<I", 1)}, {2: tflite_files.Number("<I", 3)}
    change = {"again": buffer[0], "axes": buffer[1]}
    path = written(tmp_path, tflite_files.tflite(steps, tensors, [-1, 3], ["y"], change=change))
    params, apply_fn = files.network(path)
    assert params.keys() == {"w"}
    np.testing.assert_allclose(apply_fn({"w": np.float32([1, 2, 3])}, np.ones((1, 3), np.float32)), [[2, 4, 6]])
    assert files.read(path).leaves.keys() == {"w", "buffers/zeros", "buffers/axes"}
    files.write(tmp_path / "copy.tflite", {**files.read(path).leaves, "w": weight + 1}, like=path)
    np.testing.assert_array_equal(files.read(tmp_path / "copy.tflite").leaves["w"], weight + 1)


def test_names_that_are_not_alone_or_begin_another_get_their_number(tmp_path):
    tensors = {name: PART(2) for name in ("a", "b", "c", "d", "conv-1")}  # "-" comes before "/"
    change = {"b": {3: "conv/kernel"}, "c": {3: "conv/kernel"}, "d": {3: "conv"}}
    content = tflite_files.tflite([step("RELU", ["x"], ["y"])], tensors, [1], ["y"], change=change)
    leaves = files.read(written(tmp_path, content)).leaves
    assert leaves.keys() == {"a", "conv/kernel:2", "conv/kernel:3", "conv:4", "conv-1"}
    assert files.flatten(files.nest(leaves)).keys() == leaves.keys()


def test_shapes_computed_from_shapes_stay_shapes(tmp_path):
    """As the converter writes a flatten for any number of images."""
    steps = [
        step("SHAPE", ["x"], ["s"], {0: byte(2)}, 55),
        step("STRIDED_SLICE", ["s", "zero", "one", "one"], ["n"], {4: whole(1)}, 32),
        step("PACK", ["n", "rest"], ["shape"], {0: whole(2)}, 59),
        step("RESHAPE", ["x", "shape"], ["y"]),
    ]
    tensors = {"zero": INTS(0), "one": INTS(1), "rest": np.array(-1, np.int32)}
    params, apply_fn = files.network(written(tmp_path, tflite_files.tflite(steps, tensors, [-1, 2, 3], ["y"])))
    images = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    assert not params
    np.testing.assert_array_equal(apply_fn(params, images), images.reshape(4, 6))


def test_a_graph_for_one_image_takes_any_number(tmp_path):
    steps = [step("RESHAPE", ["x", "shape"], ["flat"]), step("FULLY_CONNECTED", ["flat", "w"], ["y"], {}, DENSE)]
    tensors = {"shape": INTS(1, 6), "w": PART(4, 6)}
    params, apply_fn = files.network(written(tmp_path, tflite_files.tflite(steps, tensors, [1, 2, 3], ["y"])))
    images = PART(5, 2, 3)
    np.testing.assert_allclose(apply_fn(params, images), images.reshape(5, 6) @ tensors["w"].T, rtol=1e-5)


def together():
    """One model of all cases, whose result is their results end to end, and the names of the single results."""
    steps, tensors, types = [], {"flat": INTS(-1)}, {}
    for name, (op, inputs, kind, fields) in CASES.items():
        arguments = [f"{name}, argument {number}" for number in range(len(inputs))]
        tensors |= {key: np.asarray(value) for key, value in zip(arguments, inputs, strict=True)}
        count = {"UNPACK": 5, "SPLIT": 2, "SPLIT_V": 2}.get(op, 1)
        results = [f"{name}, {number}" for number in range(count)]
        steps.append(step(op, arguments, results, fields, kind))
        if op in OF_BOOLS or op == "SHAPE":
            types[results[0]] = {1: TYPES["INT32" if op == "SHAPE" else "BOOL"]}
            steps.append(step("CAST", results, [f"{name}, cast"], {0: TYPES["BOOL"], 1: byte(0)}, CAST))
            results = [f"{name}, cast"]
        steps.append(step("RESHAPE", [results[-1], "flat"], [name]))
    steps.append(step("CONCATENATION", ["x", *CASES], ["y"], {0: whole(0)}, CONCAT))
    return tflite_files.tflite(steps, tensors, [1], ["y", *CASES], change=types), list(CASES)


def test_operators_agree_with_the_interpreter(tmp_path):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    content, names = together()
    plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(model_content=content, experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, np.zeros(1, np.float32))
    interpreter.invoke()
    _, *expected = [interpreter.get_tensor(result["index"]) for result in interpreter.get_output_details()]
    params, apply_fn = files.network(written(tmp_path, content))
    found = np.split(np.asarray(apply_fn(params, np.zeros(1, np.float32)))[1:], np.cumsum([e.size for e in expected]))
    assert len(expected) == len(names) and not found.pop().size
    for name, result, flat in zip(names, expected, found, strict=True):
        np.testing.assert_allclose(flat, result, rtol=1e-4, atol=1e-5, err_msg=name)


def test_every_operator_has_a_case():
    operators = pytest.importorskip("smark_jax.files.networks.tflite_operators").OPERATORS
    assert operators.keys() - {op for op, *_ in CASES.values()} == {"QUANTIZE"}  # the full int8 file has it


def test_what_is_not_supported_is_named_with_its_node(tmp_path):
    steps = [step("RELU", ["x"], ["a"]), step("CUMSUM", ["a"], ["sums"]), step("RANK", ["sums"], ["y"])]
    with pytest.raises(errors.SmarkError, match="'CUMSUM' in node 'sums', and 'RANK'"):
        files.network(written(tmp_path, tflite_files.tflite(steps, {"w": PART(2)}, [1], ["y"])))
    content = tflite_files.tflite([step("ADD", ["x", "w"], ["y"], {0: byte(5)}, 11)], {"w": PART(2)}, [1, 2], ["y"])
    params, apply_fn = files.network(written(tmp_path, content))
    with pytest.raises(errors.SmarkError, match=r"in node 'y' \('ADD'\): .*fused activation 5"):
        apply_fn(params, np.ones((1, 2), np.float32))


ADD = [step("ADD", ["x", "w"], ["y"], {}, 11)]


def forged(change=None, quantisation=None, steps=ADD, ends=("y",)):
    weights = {"w": np.array([1, 2, 3], np.int8 if quantisation else np.float32)}
    return tflite_files.tflite(steps, weights, [1, 3], ends, quantisation and {"w": quantisation}, {"w": change or {}})


NUMBER = tflite_files.Number
FORGED = {
    "a buffer that is not there": (forged({2: NUMBER("<I", 9)}), "buffer 9 of"),
    "a shape beyond its bytes": (forged({0: INTS(2**20, 2**20)}), "12 bytes of data"),
    "a negative shape": (forged({0: INTS(-1, -3)}), "the shape"),
    "a type of text": (forged({1: byte(5)}), "of type 5"),
    "sparse": (forged({6: {}}), "is sparse"),
    "scales for other channels": (forged(quantisation=quantised([1, 2], [0, 0])), "2 scales"),
    "zero points for other channels": (forged(quantisation=quantised([1, 2, 3], [0, 0])), "3 scales"),
    "a rare quantisation": (forged(quantisation={**quantised(1, 0), 4: NUMBER("<B", 2)}), "quantised in a rare way"),
    "a name of two lines": (forged({3: "w\n"}), "not printable"),
    "what nothing makes": (
        forged(steps=[step("ADD", ["z", "x"], ["y"]), step("RELU", ["x"], ["z"])]),
        "before it makes",
    ),
    "a tensor that is not there": (forged(ends=[7]), "tensor 7 of 3"),
    "no graph": (tflite_files.flatbuffer({0: NUMBER("<I", 3), 2: [], 4: []}, b"TFL3"), "graph 0 of 0"),
    "a table outside": (b"\xff\xff\xff\x7fTFL3", "points to byte 2,147,483,647"),
    "nothing": (b"\0\0\0\0TFL3", "damaged or forged|no graph|graph 0"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(case, tmp_path):
    content, said = FORGED[case]
    with pytest.raises(errors.Unreadable, match=said) as refusal:
        files.network(written(tmp_path, content))
        files.read(written(tmp_path, content))
    assert "\n" not in str(refusal.value)


def test_what_tables_share_is_counted_as_often_as_it_is_read(tmp_path):
    """A small file whose many operators or tensors share one long part asks for far more than it holds."""
    shared = {0: NUMBER("<I", 0), 1: np.zeros(2**12, np.int32), 2: INTS(0)}
    tensor = {0: INTS(2**12), 1: byte(9), 2: NUMBER("<I", 1), 3: "w", 4: quantised(1, 0)}
    image = {0: INTS(1), 1: byte(0), 3: "x"}
    cases = {"fields and small numbers": ([shared] * 200, [image]), "more bytes than": ([], [image, *[tensor] * 100])}
    for said, (operators, tensors) in cases.items():
        graph = {0: tensors, 1: INTS(0), 2: INTS(0), 3: operators}
        root = {1: [{0: byte(19)}], 2: [graph], 4: [{}, {0: np.zeros(2**12, np.uint8)}]}
        path = written(tmp_path, tflite_files.flatbuffer(root, b"TFL3"))
        assert path.stat().st_size < 2**16
        with pytest.raises(errors.Unreadable, match=said):
            files.network(path, max_bytes=2**20)


def test_broken_files_are_refused_or_read_and_never_raise_anything_else(tmp_path):
    content = forged(quantisation=quantised([1, 2, 3], [0, 1, 2]))
    ends = network_files.ends_of_broken(content, lambda broken: written(tmp_path, broken), number=200, first=8)
    assert len(ends) == 4  # the control: some files were read, and some were not, by both
