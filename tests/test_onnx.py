"""Quantised and optimised ONNX graphs against definitions and onnxruntime; operators against ONNX's own tests."""

import functools
import importlib
import pkgutil
import re

import jax
import network_files
import numpy as np
import pytest
from network_files import Step, field

from smark_jax import errors, files
from smark_jax.files import _limits
from smark_jax.files._places import Unwritable
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph, onnx, onnx_operators

RNG = np.random.default_rng(5)
IMAGES = RNG.normal(size=(4, 2, 6, 5)).astype(np.float32)
# Of seven bits: without VNNI, onnxruntime adds products of two bytes in sixteen bits, which eight would exceed.
KERNEL, DENSE = (RNG.integers(-64, 64, size).astype(np.int8) for size in ((4, 2, 3, 3), (64, 3)))
BIAS = RNG.integers(-2000, 2000, 4).astype(np.int32)
# Of the image, the first layer's result, and the logits.
STEPS = {"x": (0.03, 120), "h": (0.05, 3), "y": (0.1, 128)}
WHOLE = {f"{name}_scale": np.float32(scale) for name, (scale, _) in STEPS.items()} | {
    f"{name}_zero": np.uint8(zero) for name, (_, zero) in STEPS.items()
}


def weights(each_channel):
    """The quantised tensors, and the leaves that they stand for by their definition."""
    scales = RNG.uniform(0.002, 0.02, 4).astype(np.float32) if each_channel else np.float32(0.01)
    zero = np.zeros(np.shape(scales), np.int8) if each_channel else np.int8(-3)
    tensors = {
        "k_quantized": KERNEL, "k_scale": scales, "k_zero": zero, "b_quantized": BIAS,
        "b_scale": np.float32(STEPS["x"][0]) * scales, "b_zero": np.zeros(np.shape(scales), np.int32),
        "d_quantized": DENSE, "d_scale": np.float32(0.004), "d_zero": np.int8(7),
    }  # fmt: skip
    along = np.reshape(scales.astype(np.float64), (-1, 1, 1, 1))
    leaves = {
        "k": (KERNEL.astype(np.float64) - (0 if each_channel else -3)) * along,
        "b": BIAS * STEPS["x"][0] * scales.astype(np.float64),
        "d": (DENSE.astype(np.float64) - 7) * 0.004,
    }
    return tensors, leaves


def between(name):
    """A value in whole numbers and back."""
    return [
        Step("QuantizeLinear", [name, f"{name}_scale", f"{name}_zero"], [f"{name}_whole"]),
        Step("DequantizeLinear", [f"{name}_whole", f"{name}_scale", f"{name}_zero"], [f"{name}_real"]),
    ]


def qdq():
    parts = [
        Step("DequantizeLinear", [f"{name}_quantized", f"{name}_scale", f"{name}_zero"], [f"{name}_dq"], {"axis": 0})
        for name in "kbd"
    ]
    return [
        *between("x"), *parts, Step("Conv", ["x_real", "k_dq", "b_dq"], ["h"], {"pads": [0, 0, 0, 1]}), *between("h"),
        Step("Flatten", ["h_real"], ["flat"]), Step("MatMul", ["flat", "d_dq"], ["y"]), *between("y"),
    ]  # fmt: skip


def operators():
    kernel, dense = ([f"{name}_quantized", f"{name}_scale", f"{name}_zero"] for name in "kd")
    return [
        between("x")[0],
        Step("QLinearConv", ["x_whole", "x_scale", "x_zero", *kernel, "h_scale", "h_zero", "b_quantized"], ["h_whole"],
             {"pads": [0, 0, 0, 1]}),
        Step("Flatten", ["h_whole"], ["flat"]),
        Step("QLinearMatMul", ["flat", "h_scale", "h_zero", *dense, "y_scale", "y_zero"], ["y_whole"]),
        between("y")[1],
    ]  # fmt: skip


FORMS = {"qdq": qdq, "qoperator": operators}


def written(tmp_path, content):
    (tmp_path / "network").write_bytes(content)
    return tmp_path / "network"


@pytest.mark.parametrize("each_channel", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_graph_has_the_real_leaves_that_it_stands_for(form, each_channel, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    tensors, leaves = weights(each_channel)
    steps = FORMS[form]()
    taken = {name for step in steps for name in step.inputs}
    used = {name: tensor for name, tensor in (WHOLE | tensors).items() if name in taken}
    content = network_files.onnx(steps, used, ("n", 2, 6, 5), "y_real", 13)
    path = written(tmp_path, content)
    params, apply_fn = files.network(path)
    assert params.keys() == leaves.keys() <= files.read(path).leaves.keys()
    for name, leaf in leaves.items():
        assert params[name].dtype == np.float32
        np.testing.assert_allclose(params[name], leaf, rtol=1e-5, atol=1e-7)
        assert (files.read(path).leaves[name] == params[name]).all()
        assert onnx.places(Source(content))[name] is Unwritable.QUANTISED
    (expected,) = runtime.InferenceSession(content).run(["y_real"], {"x": IMAGES})
    # A sum that lies between two steps may be rounded to either.
    assert np.abs(apply_fn(params, IMAGES) - expected).max() <= 1.01 * STEPS["y"][0]
    assert np.ptp(expected) > 20 * STEPS["y"][0]


def test_products_that_are_scaled_later_have_real_leaves(tmp_path):
    """As onnxruntime's dynamic quantisation writes them."""
    runtime = pytest.importorskip("onnxruntime")
    steps = [
        Step("Flatten", ["x"], ["flat"]),
        Step("DynamicQuantizeLinear", ["flat"], ["q", "s", "z"]),
        Step("Mul", ["s", "w_scale"], ["both"]),
        Step("MatMulInteger", ["q", "w_quantized", "z", "w_zero"], ["p"]),
        Step("Cast", ["p"], ["c"], {"to": 1}),
        Step("Mul", ["c", "both"], ["y"]),
    ]
    matrix, scale = RNG.integers(0, 256, (60, 3)).astype(np.uint8), RNG.uniform(0.01, 0.02, 3).astype(np.float32)
    tensors = {"w_quantized": matrix, "w_scale": scale, "w_zero": np.array([120, 128, 140], np.uint8)}
    content = network_files.onnx(steps, tensors, ("n", 2, 6, 5), "y", 13)
    params, apply_fn = files.network(written(tmp_path, content))
    assert params.keys() == {"w"}
    np.testing.assert_allclose(params["w"], (matrix - np.array([120.0, 128, 140])) * scale, rtol=1e-5)
    (expected,) = runtime.InferenceSession(content).run(None, {"x": IMAGES})
    np.testing.assert_allclose(apply_fn(params, IMAGES), expected, rtol=1e-4, atol=1e-3)
    assert files.read(tmp_path / "network").leaves.keys() == {"w"}


def test_scales_of_blocks_and_odd_shapes(tmp_path):
    whole = RNG.integers(-8, 8, (4, 6)).astype(np.int8)
    scales = RNG.uniform(0.1, 1, (4, 2)).astype(np.float32)
    blocks = [
        Step("DequantizeLinear", ["w", "s"], ["r"], {"axis": 1, "block_size": 3}), Step("MatMul", ["x", "r"], ["y"])
    ]  # fmt: skip
    path = written(tmp_path, network_files.onnx(blocks, {"w": whole, "s": scales}, ("n", 4), "y", 21))
    np.testing.assert_allclose(files.read(path).leaves["r"], whole * np.repeat(scales, 3, 1), rtol=1e-6)
    odd = network_files.onnx(blocks, {"w": whole, "s": scales[:3]}, ("n", 4), "y", 21)
    assert "r" not in files.read(written(tmp_path, odd)).leaves  # as it is: whole numbers that nothing explains


def test_a_file_of_few_whole_numbers_cannot_ask_for_many_real_ones():
    """The same tensor may be dequantised by any number of nodes."""
    steps = [
        Step("DequantizeLinear", ["w", f"s{n}"], [f"r{n}"]) for n in range(50)
    ] + [Step("Relu", ["x"], ["y"])]  # fmt: skip
    tensors = {"w": np.ones(1000, np.int8)} | {f"s{n}": np.float32(n + 1) for n in range(50)}
    content = network_files.onnx(steps, tensors, ("n", 3), "y")
    assert len(onnx.read(Source(content), _limits.MAX_BYTES)) == 50
    with pytest.raises(errors.Unreadable, match="float32 take more bytes"):
        onnx.read(Source(content), 100_000)


def test_a_softmax_before_a_node_that_changes_nothing_is_left_out(tmp_path):
    steps = [Step("MatMul", ["x", "w"], ["a"]), Step("Softmax", ["a"], ["b"]), Step("Identity", ["b"], ["y"])]
    matrix = RNG.normal(size=(3, 2)).astype(np.float32)
    params, apply_fn = files.network(written(tmp_path, network_files.onnx(steps, {"w": matrix}, ("n", 3), "y")))
    images = np.float32([[1, 2, 3]])
    np.testing.assert_allclose(apply_fn(params, images), images @ matrix, rtol=1e-5)


def test_copies_with_numbers_in_another_file_run_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    (tmp_path / "base").mkdir()
    matrix, bias = RNG.normal(size=(3, 2)).astype(np.float32), np.float32([1, 2])
    (tmp_path / "base/numbers").write_bytes(b"----" + matrix.tobytes())
    entries = {"location": "numbers", "offset": "4", "length": "24"}
    outside = b"".join(network_files.field(1, n) for n in matrix.shape) + network_files.field(2, 1)
    outside += network_files.field(8, "w") + network_files.field(14, 1)
    for key, value in entries.items():
        outside += network_files.field(13, network_files.field(1, key) + network_files.field(2, value))
    steps = [Step("MatMul", ["x", "w"], ["a"]), Step("Add", ["a", "b"], ["y"])]
    content = network_files.onnx(steps, {"b": bias}, ("n", 3), "y", more=network_files.field(5, outside))
    base = written(tmp_path / "base", content).rename(tmp_path / "base/net.onnx")
    files.write(tmp_path / "copy", {"w": 2 * matrix, "b": -bias}, like=base)
    images = np.float32([[1, 2, 3], [0, -1, 5]])
    session = runtime.InferenceSession(tmp_path / "copy/net.onnx")
    np.testing.assert_allclose(session.run(None, {"x": images})[0], images @ (2 * matrix) - bias, rtol=1e-5)
    assert (tmp_path / "copy/numbers").read_bytes() == b"----" + (2 * matrix).tobytes()
    old, new = (np.frombuffer(path.read_bytes(), np.uint8) for path in (base, tmp_path / "copy/net.onnx"))
    assert len(old) == len(new) and 0 < (old != new).sum() <= bias.nbytes


PART = lambda *shape: RNG.normal(size=shape).astype(np.float32)  # noqa: E731
ROWS = PART(2, 5, 8)
FUSED = {
    "Gelu": ([], {}),
    "BiasGelu": ([PART(8)], {}),
    "FastGelu": ([PART(8)], {}),
    "QuickGelu": ([], {"alpha": 1.5}),
    "FusedMatMul": ([PART(2, 4, 8)], {"transB": 1, "alpha": 0.5}),
    "SkipLayerNormalization": ([PART(2, 5, 8), PART(8), PART(8), PART(8)], {"epsilon": 1e-3}),
    "Attention": ([PART(8, 24), PART(24)], {"num_heads": 2}),
    "MultiHeadAttention": ([PART(2, 5, 8), PART(2, 5, 8), PART(24)], {"num_heads": 2}),
    "FusedConv": ([PART(6, 2, 3, 3), PART(6), PART(4, 6, 6, 5)], {"activation": "Relu", "pads": [1, 1, 1, 1]}, IMAGES),
    "FusedGemm": ([PART(3, 8), PART(3)], {"transB": 1, "activation": "Tanh"}, ROWS[0]),
}  # fmt: skip


def test_operators_that_onnxruntime_fuses_agree_with_it(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    steps, tensors, outputs = [], {}, b""
    for op, (others, settings, *image) in FUSED.items():
        arrays = {f"{op}, argument {number}": array for number, array in enumerate([*(image or [ROWS]), *others])}
        tensors |= arrays
        steps.append(Step(op, list(arrays), [op], settings, "com.microsoft"))
        outputs += network_files.field(12, network_files.field(1, op))
    steps += [Step("Reshape", [op, "flat"], [f"{op}, flat"]) for op in FUSED]
    steps.append(Step("Concat", [f"{op}, flat" for op in FUSED], ["y"], {"axis": 0}))
    content = network_files.onnx(steps, tensors | {"flat": np.array([-1])}, (1,), "y", 17, outputs)
    content += network_files.field(8, network_files.field(1, "com.microsoft") + network_files.field(2, 1))
    _, *expected = runtime.InferenceSession(content).run(None, {"x": np.zeros(1, np.float32)})
    params, apply_fn = files.network(written(tmp_path, content))
    found = np.split(np.asarray(apply_fn(params, np.zeros(1))), np.cumsum([result.size for result in expected]))
    for op, result, flat in zip(FUSED, expected, found, strict=False):
        np.testing.assert_allclose(flat, result.reshape(-1), rtol=1e-4, atol=1e-4, err_msg=op)


def test_a_network_that_onnxruntime_quantised_or_optimised_reads_like_its_base(tmp_path):
    runtime, quantise = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxruntime.quantization")
    net = network_files.classifier()
    base, images = written(tmp_path, net.onnx()), RNG.normal(size=(8, 2, 6, 5)).astype(np.float32)
    expected = net.logits(images)

    class Reader(quantise.CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": images}]

        def get_next(self):
            return self.left.pop() if self.left else None

    made = {name: tmp_path / f"{name}.onnx" for name in ("optimised", "qdq", "qoperator", "dynamic")}
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(made["optimised"])
    runtime.InferenceSession(base, options)
    for name, form in (("qdq", quantise.QuantFormat.QDQ), ("qoperator", quantise.QuantFormat.QOperator)):
        quantise.quantize_static(base, made[name], Reader(), quant_format=form, per_channel=True)
    quantise.quantize_dynamic(base, made["dynamic"], weight_type=quantise.QuantType.QInt8)
    for name, path in made.items():
        params, apply_fn = files.network(path)
        assert np.corrcoef(apply_fn(params, images).reshape(-1), expected.reshape(-1))[0, 1] > 0.999, name
        (dense,) = (leaf for leaf in files.read(path).leaves.values() if sorted(leaf.shape) == [5, 12])
        dense = dense if dense.shape == (5, 12) else dense.T
        np.testing.assert_allclose(dense, net.weights["fc.weight"], atol=0.02, err_msg=name)


# What the nodes of classifiers never do: caches and windows of attention, training, masks as results, empty axes.
_LEFT_OUT = re.compile(
    "past|padded_kv|nonpad|softcap|window|nan_robustness|fullymasked|output_mode|qk_matmul|training|_mask$|_mask_ratio|"
    "empty_set|blocked|einsum_scalar|integer|uint8$|cubic|antialias|crop_and_resize|not_larger|not_smaller|symmetric|"
    "downsample_scales_linear_align_corners"  # whose corners are not those that onnxruntime aligns
)
_EACH = {"Resize": 50, "ConvTranspose": 50}  # cases of an operator, if not one


def node_tests():
    """ONNX's own cases of our operators: the model, inputs and the first result by name, some of each operator."""
    folder = importlib.import_module("onnx.backend.test.case.node")
    known = {re.sub("[^a-z0-9]", "", op.lower()) for op in onnx_operators.OPERATORS}
    spelled = {"rangeop": "range", "reducelogsum": "reducelogsum"}
    for module in pkgutil.iter_modules(folder.__path__):
        plain = module.name.replace("_", "")
        if spelled.get(plain, plain) in known:
            importlib.import_module(f"{folder.__name__}.{module.name}")
    found, counts = {}, {}
    for case in folder._NodeTestCases:
        ops = {node.op_type for node in case.model.graph.node}
        ((inputs, outputs), *_) = case.data_sets
        plain = all(isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "fiub" for x in (*inputs, outputs[0]))
        if not plain or len(ops) != 1 or not ops <= onnx_operators.OPERATORS.keys() or _LEFT_OUT.search(case.name):
            continue
        (op,) = ops
        counts[op] = counts.get(op, 0) + 1
        if counts[op] <= _EACH.get(op, 1):
            found[case.name] = (case.model, inputs, np.asarray(outputs[0]))
    return found


def test_operators_pass_the_tests_of_onnx_itself():
    helper = pytest.importorskip("onnx.numpy_helper")
    with np.errstate(all="ignore"):
        cases = {name: case for name, case in node_tests().items() if not name.startswith("test_softmax")}
    assert len({node.op_type for model, *_ in cases.values() for node in model.graph.node}) > 80
    functions, images = {}, {}
    for name, (model, inputs, _) in cases.items():
        names = [value.name for value in model.graph.input]
        shapes = np.ndim(inputs[0]) == 0 or name.startswith("test_constantof")  # an image has axes, and decides on none
        for number in range(0 if shapes else 1, len(inputs)):
            model.graph.initializer.append(helper.from_array(np.asarray(inputs[number]), names[number]))
        if shapes:
            model.graph.input.append(type(model.graph.input[0])(name="an image that nothing takes"))
        found = onnx.load(Source(model.SerializeToString()), _limits.MAX_BYTES)._replace(shape=())
        images[name] = np.zeros(1, np.float32) if shapes else inputs[0]
        functions[name] = functools.partial(graph.function(found, onnx_operators.OPERATORS), found.params)
    results = jax.jit(lambda images: {name: functions[name](image) for name, image in images.items()})(images)
    for name, (*_, expected) in cases.items():
        found, expected = (np.asarray(array).astype(np.float64) for array in (results[name], expected))
        assert found.shape == expected.shape, name
        near = 1 if "dynamicquantize" in name else 2e-2 if "16" in name else 1e-5  # a tie is rounded either way
        np.testing.assert_allclose(found, expected, 1e-3, near, err_msg=name)


def sparse(name, array, by_axis=False, dtype=np.int64):
    """A sparse tensor with all of an array's numbers."""
    places = np.argwhere(np.ones(array.shape)) if by_axis else np.arange(array.size)
    parts = field(1, network_files.tensor(name, array.reshape(-1)))
    parts += field(2, network_files.tensor("", places.astype(dtype)))
    return field(15, parts + b"".join(field(3, size) for size in array.shape))


WEIGHTS = {"w": RNG.normal(size=(4, 3)).astype(np.float32), "v": RNG.normal(size=(5, 6)).astype(np.float32)}
TWICE = field(5, network_files.tensor("w", WEIGHTS["w"]))
ODD = {
    "a tensor twice, of which the last counts": ({**WEIGHTS, "w": -WEIGHTS["w"]}, TWICE, True),
    "a tensor without a name": (WEIGHTS, field(5, network_files.tensor("", WEIGHTS["w"])), True),
    "a constant of text": (WEIGHTS, field(1, field(2, "c") + field(4, "Constant")), True),
    "a sparse tensor": ({"v": WEIGHTS["v"]}, sparse("w", WEIGHTS["w"]), False),
    "a sparse tensor by its axes": ({"v": WEIGHTS["v"]}, sparse("w", WEIGHTS["w"], by_axis=True), False),
    "a sparse tensor as onnxruntime writes it": ({"v": WEIGHTS["v"]}, sparse("w", WEIGHTS["w"], dtype=np.int8), False),
}


@pytest.mark.parametrize("case", ODD)
def test_what_no_network_needs_hides_no_weight(case, tmp_path):
    """Runtimes run such files, so a suspect may be one; a base is read whole or not at all."""
    tensors, more, is_odd = ODD[case]
    path = tmp_path / "odd"
    path.write_bytes(network_files.onnx([Step("Relu", ["x"], ["y"])], tensors, ("n", 3), "y", more=more))
    leaves = files.read(path, strict=False).leaves
    for name, leaf in WEIGHTS.items():
        np.testing.assert_array_equal(leaves[name], leaf)
    if is_odd:
        with pytest.raises(errors.Unreadable):
            files.read(path)


def test_a_field_that_onnx_does_not_know_hides_no_weight(tmp_path):
    content = network_files.onnx([Step("Relu", ["x"], ["y"])], WEIGHTS, ("n", 3), "y")
    (tmp_path / "odd").write_bytes(content + field(127, 1))
    np.testing.assert_array_equal(files.read(tmp_path / "odd").leaves["w"], WEIGHTS["w"])


@pytest.mark.parametrize(
    ("places", "shape"),
    (([0, 12], (4, 3)), ([-1, 0], (4, 3)), ([0], (4, 3)), ([0, 1], ()), ([0, 1], (0,)), ([0, 1], (2**40, 2**7)),
     ([0, 1], (2**20, 2**20)), ([[0, 1, 2], [1, 1, 1]], (4, 3)), (np.zeros((2, 0)), ()), ([], (0,))),
)  # fmt: skip
def test_a_forged_sparse_tensor_is_refused(places, shape, tmp_path):
    parts = field(1, network_files.tensor("w", np.ones(2, np.float32)))
    parts += field(2, network_files.tensor("", np.asarray(places, np.int64)))
    more = field(15, parts + b"".join(field(3, size) for size in shape))
    (tmp_path / "forged").write_bytes(network_files.onnx([Step("Relu", ["x"], ["y"])], {}, ("n", 3), "y", more=more))
    with pytest.raises(errors.Unreadable):
        files.read(tmp_path / "forged", strict=False)
