"""ONNX files that onnxruntime saved in blocks of channels or with few bits, and images of another size, against it."""

import itertools

import network_files
import numpy as np
import pytest
from network_files import Step

from smark_jax import errors, files
from smark_jax.files._places import Unwritable
from smark_jax.files._sources import Source
from smark_jax.files.networks import onnx

RNG = np.random.default_rng(6)
NCHWC, MICROSOFT = "com.microsoft.nchwc", "com.microsoft"


def part(*shape):
    """Weights whose channels differ in size."""
    return (RNG.normal(size=shape) * RNG.uniform(0.1, 0.5, (shape[0],) + (1,) * (len(shape) - 1))).astype(np.float32)


def written(tmp_path, content):
    (tmp_path / "network").write_bytes(content)
    return tmp_path / "network"


def with_domain(content, *domains):
    """A model that says the versions of operators of other domains."""
    return content + b"".join(
        network_files.field(8, network_files.field(1, d) + network_files.field(2, 1)) for d in domains
    )


# Channels that fill no block, a depthwise convolution between them, groups, sums, blocks as an axis, an image of twice
# the size, and pools inside and outside of blocks.
WEIGHTS = {
    "k0": part(12, 3, 3, 3), "b0": part(12), "depthwise": part(12, 1, 3, 3), "pointwise": part(20, 12, 1, 1),
    "b1": part(20), "k2": part(32, 20, 3, 3), "grouped": part(32, 16, 3, 3), "b3": part(32), "k4": part(32, 32, 1, 1),
    "k5": part(16, 32, 1, 1), "k6": part(12, 48, 1, 1), "dense": part(12, 5),
}  # fmt: skip
SCALES = np.float32([1, 1, 2, 2])
SAME = {"pads": [1, 1, 1, 1]}
STEPS = [
    Step("Conv", ["x", "k0", "b0"], ["a"], SAME | {"strides": [2, 2]}), Step("Sigmoid", ["a"], ["s"]),
    Step("Mul", ["a", "s"], ["a1"]), Step("Conv", ["a1", "depthwise"], ["b"], SAME | {"group": 12}),
    Step("Clip", ["b", "low", "high"], ["b1_"]), Step("Conv", ["b1_", "pointwise", "b1"], ["c"]),
    Step("MaxPool", ["c"], ["c1"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Step("Conv", ["c1", "k2"], ["d"], SAME), Step("Relu", ["d"], ["d1"]),
    Step("Conv", ["d1", "grouped", "b3"], ["e"], SAME | {"group": 2}), Step("Conv", ["e", "k4"], ["f"]),
    Step("Add", ["f", "d1"], ["g"]), Step("Relu", ["g"], ["g1"]),
    Step("Resize", ["g1", "", "scales"], ["h"],
         {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    Step("Conv", ["h", "k5"], ["i"]), Step("AveragePool", ["i"], ["i1"], {"kernel_shape": [3, 3], **SAME}),
    Step("Concat", ["i1", "h"], ["j"], {"axis": 1}), Step("Conv", ["j", "k6"], ["l"]),
    Step("GlobalAveragePool", ["l"], ["m"]), Step("Flatten", ["m"], ["n"]), Step("MatMul", ["n", "dense"], ["y"]),
]  # fmt: skip
IMAGES = RNG.normal(size=(4, 3, 16, 16)).astype(np.float32)


# Sums of images whose equal sizes onnxruntime cannot tell: it reshapes them to blocks and back.
SUMS = {"k0": part(20, 3, 3, 3), "k1": part(20, 3, 1, 1), "k2": part(20, 20, 1, 1)}
SUM_STEPS = [
    Step("Conv", ["x", "k0"], ["a"], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}), Step("Relu", ["a"], ["a1"]),
    Step("Conv", ["x", "k1"], ["b"]),
    Step("MaxPool", ["b"], ["b1"], {"kernel_shape": [3, 3], "strides": [2, 2], **SAME}),
    Step("Conv", ["b1", "k2"], ["b2"]), Step("Sigmoid", ["b2"], ["b3"]), Step("Add", ["a1", "b3"], ["y"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "weights", "size"), [(STEPS, WEIGHTS, 16), (SUM_STEPS, SUMS, "any")], ids=["layers", "sums"]
)
def test_what_onnxruntime_saves_at_its_highest_level_is_the_network(steps, weights, size, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    settings = {"low": np.float32(0), "high": np.float32(6), "scales": SCALES} if steps is STEPS else {}
    plain = network_files.onnx(steps, weights | settings, ("n", 3, size, size), "y")
    options, saved = runtime.SessionOptions(), tmp_path / "saved"
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath, options.log_severity_level = str(saved), 3
    (expected,) = runtime.InferenceSession(plain, options, providers=["CPUExecutionProvider"]).run(None, {"x": IMAGES})
    if NCHWC.encode() not in saved.read_bytes():
        pytest.skip("onnxruntime keeps no channels in blocks on this processor")
    params, apply_fn = files.network(saved)
    leaves = files.read(saved).leaves
    assert len(params) == len(weights) and all((leaves[name] == leaf).all() for name, leaf in params.items())
    for name, weight in weights.items():
        same = [leaf for leaf in params.values() if leaf.shape == weight.shape and (leaf == weight).all()]
        assert len(same) == 1, name
    np.testing.assert_allclose(apply_fn(params, IMAGES), expected, rtol=1e-5, atol=1e-5)
    kernels = {name: weight for name, weight in weights.items() if weight.ndim == 4}
    found = files.match_layout(leaves, kernels).leaves
    assert all((found[name] == kernel).all() for name, kernel in kernels.items())


def stored(kernel, block, both):
    """A kernel as the processor's convolutions take it, number by number; channels that fill up are zero."""
    outputs, inputs, height, width = kernel.shape
    up = lambda number: -(-number // block)  # noqa: E731
    shape = (up(outputs) * block, up(inputs) * block if both else inputs, height, width)
    found = np.zeros((up(outputs), up(inputs), height, width, block, block) if both else
                     (up(outputs), inputs, height, width, block), np.float32)  # fmt: skip
    for o, i, y, x in itertools.product(*map(range, kernel.shape)):
        place = (o // block, i // block, y, x, i % block, o % block) if both else (o // block, i, y, x, o % block)
        found[place] = kernel[o, i, y, x]
    return found.reshape(shape)


@pytest.mark.parametrize("channels", [20, 32])
@pytest.mark.parametrize("block", [8, 16])
def test_kernels_in_blocks_of_either_size_are_put_in_order(block, channels, tmp_path):
    """Of 32 channels, both sizes fit, and content decides."""
    width = -(-channels // block) * block
    kernels = {"first": part(channels, 3, 2, 2), "depthwise": part(channels, 1, 3, 3), "last": part(32, channels, 1, 1)}
    tensors = {name: stored(kernel, block, name == "last") for name, kernel in kernels.items()}
    steps = [
        Step("Conv", ["x", "first"], ["a"], {"activation": "Relu"}, NCHWC),
        Step("Conv", ["a", "depthwise"], ["b"], {"group": width}, NCHWC),
        Step("Add", ["b", "b"], ["c"]), Step("Conv", ["c", "last"], ["d"], {}, NCHWC),
        Step("ReorderOutput", ["d"], ["y"], {"channels": 32}, NCHWC),
    ]  # fmt: skip
    content = network_files.onnx(steps, tensors, ("n", 3, 16, 16), "y")
    params, apply_fn = files.network(written(tmp_path, content))
    assert params.keys() == kernels.keys()
    assert all((params[name] == kernel).all() for name, kernel in kernels.items())
    assert set(onnx.places(Source(content)).values()) == {Unwritable.PACKED}
    plain = [
        Step("Conv", ["x", "first"], ["a"]), Step("Relu", ["a"], ["r"]),
        Step("Conv", ["r", "depthwise"], ["b"], {"group": channels}), Step("Add", ["b", "b"], ["c"]),
        Step("Conv", ["c", "last"], ["y"]),
    ]  # fmt: skip
    session = pytest.importorskip("onnxruntime").InferenceSession(
        network_files.onnx(plain, kernels, ("n", 3, 16, 16), "y")
    )
    np.testing.assert_allclose(apply_fn(params, IMAGES), session.run(None, {"x": IMAGES})[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 3, 2, 2), (16, 3, 2), (0, 3, 2, 2)])
def test_a_kernel_that_is_in_no_blocks_stays_and_its_operator_is_named(shape, tmp_path):
    steps = [Step("Conv", ["x", "k"], ["a"], {}, NCHWC), Step("ReorderOutput", ["a"], ["y"], {"channels": 20}, NCHWC)]
    kernel = np.ones(shape, np.float32)
    path = written(tmp_path, network_files.onnx(steps, {"k": kernel}, ("n", 3, 16, 16), "y"))
    assert all(leaf.shape == shape for leaf in files.read(path).leaves.values())
    with pytest.raises(errors.SmarkError, match=r"com\.microsoft\.nchwc\.Conv"):
        files.network(path)


def packed(codes, bits):
    """Rows of codes in bytes, the first in the lowest bits."""
    each = 8 // bits
    found = np.zeros((len(codes), -(-codes.shape[1] // each)), np.uint8)
    for row, column in itertools.product(*map(range, codes.shape)):
        found[row, column // each] |= codes[row, column] << bits * (column % each)
    return found


@pytest.mark.parametrize(("bits", "zeros"), [(4, None), (4, "packed"), (4, "real"), (8, None), (8, "packed")])
def test_products_with_few_bits_have_the_matrix_that_they_stand_for(bits, zeros, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    rows, columns, block, blocks = 5, 70, 32, 3
    codes = RNG.integers(0, 2**bits, (rows, blocks * block)).astype(np.uint8)
    scales, shift = part(rows, blocks), RNG.integers(0, 2**bits, (rows, blocks)).astype(np.uint8)
    tensors = {"w_Q4": packed(codes, bits).reshape(rows, blocks, -1), "s": scales, "bias": part(rows)}
    if zeros is None:
        shift = np.full((rows, blocks), 2 ** (bits - 1))
    else:
        tensors["z"] = packed(shift, bits) if zeros == "packed" else shift.astype(np.float32)
    settings = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    inputs = ["x", "w_Q4", "s", "z" if zeros else "", "", "bias"]
    content = network_files.onnx(
        [Step("MatMulNBits", inputs, ["y"], settings, MICROSOFT)], tensors, ("n", columns), "y"
    )
    content = with_domain(content, MICROSOFT)
    params, apply_fn = files.network(written(tmp_path, content))
    whole = (codes.astype(np.float64) - np.repeat(shift, block, 1)) * np.repeat(scales, block, 1)
    assert params.keys() == {"w", "bias"}
    np.testing.assert_allclose(params["w"], whole[:, :columns], rtol=1e-6)
    images = RNG.normal(size=(3, columns)).astype(np.float32)
    (expected,) = runtime.InferenceSession(content).run(None, {"x": images})
    np.testing.assert_allclose(apply_fn(params, images), expected, rtol=1e-3, atol=1e-3 * abs(expected).max())


def test_what_onnxruntimes_quantiser_of_products_writes_reads_like_its_base(tmp_path):
    pytest.importorskip("onnx_ir")
    quantiser = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    model, runtime = pytest.importorskip("onnx").load, pytest.importorskip("onnxruntime")
    matrix = part(70, 5)
    base = written(tmp_path, network_files.onnx([Step("MatMul", ["x", "w"], ["y"])], {"w": matrix}, ("n", 70), "y", 21))
    for form, symmetric in itertools.product(quantiser.QuantFormat, (False, True)):
        config = quantiser.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, quant_format=form)
        quantised = quantiser.MatMulNBitsQuantizer(model(base), algo_config=config)
        quantised.process()
        content = quantised.model.model.SerializeToString()
        (tmp_path / "quantised").write_bytes(content)
        params, apply_fn = files.network(tmp_path / "quantised")
        assert params.keys() == {"w"} and abs(params["w"].reshape(-1).std() / matrix.std() - 1) < 0.05
        (expected,) = runtime.InferenceSession(content).run(None, {"x": np.eye(70, dtype=np.float32)})
        found = params["w"] if params["w"].shape == matrix.shape else params["w"].T
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(apply_fn(params, np.eye(70, dtype=np.float32)), expected, atol=1e-6)


@pytest.mark.parametrize("change", [{"K": 2**40}, {"N": 2**40}, {"bits": 3}, {"block_size": 0}, {"block_size": 2**40}])
def test_a_product_whose_settings_do_not_fit_is_named(change, tmp_path):
    settings = {"K": 32, "N": 1, "bits": 4, "block_size": 32} | change
    tensors = {"w": np.zeros((1, 1, 16), np.uint8), "s": np.ones((1, 1), np.float32)}
    steps = [Step("MatMulNBits", ["x", "w", "s"], ["y"], settings, MICROSOFT)]
    with pytest.raises(errors.SmarkError, match="MatMulNBits"):
        files.network(written(tmp_path, network_files.onnx(steps, tensors, ("n", 32), "y")))


def test_blocks_of_scales_whose_last_is_shorter_and_those_of_too_many(tmp_path):
    whole, scales = RNG.integers(-8, 8, (5, 70)).astype(np.int8), part(5, 3)
    steps = [
        Step("DequantizeLinear", ["w", "s"], ["r"], {"axis": 1, "block_size": 32}),
        Step("MatMul", ["x", "r"], ["y"]),
    ]
    path = written(tmp_path, network_files.onnx(steps, {"w": whole, "s": scales}, ("n", 5), "y", 21))
    np.testing.assert_allclose(files.read(path).leaves["r"], whole * np.repeat(scales, 32, 1)[:, :70], rtol=1e-6)
    many = {"w": np.zeros((1, 2**20), np.int8), "s": np.ones((2**20, 1), np.float32)}  # 2**40 factors, if repeated
    steps[0] = Step("DequantizeLinear", ["w", "s"], ["r"], {"axis": 1, "block_size": 2**20})
    path = written(tmp_path, network_files.onnx(steps, many, ("n", 1), "y", 21))
    assert "r" not in files.read(path).leaves


MODES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
RESIZED = [
    *(({"mode": mode, "coordinate_transformation_mode": how}, kind, factor)
      for mode, how, kind, factor in itertools.product(("nearest", "linear"), MODES, ("scales", "sizes"), (2, 0.6))),
    *(({"nearest_mode": how}, "scales", 1.7) for how in ("floor", "ceil", "round_prefer_ceil")),
]  # fmt: skip


def test_resizing_agrees_with_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    images = RNG.normal(size=(2, 3, 5, 7)).astype(np.float32)
    steps, tensors = [], {"flat": np.array([0, -1])}
    for number, (settings, kind, factor) in enumerate(RESIZED):
        tensors[f"t{number}"] = (
            np.float32([1, 1, factor, factor]) if kind == "scales"
            else np.array([2, 3, int(5 * factor), int(7 * factor)])
        )  # fmt: skip
        inputs = ["x", "", f"t{number}"] if kind == "scales" else ["x", "", "", f"t{number}"]
        steps += [
            Step("Resize", inputs, [f"r{number}"], settings),
            Step("Reshape", [f"r{number}", "flat"], [f"f{number}"]),
        ]
    steps.append(Step("Concat", [f"f{number}" for number in range(len(RESIZED))], ["y"], {"axis": 1}))
    content = network_files.onnx(steps, tensors, (2, 3, 5, 7), "y", 13)
    params, apply_fn = files.network(written(tmp_path, content))
    assert not params
    (expected,) = runtime.InferenceSession(content).run(None, {"x": images})
    np.testing.assert_allclose(apply_fn(params, images), expected, atol=1e-5)


@pytest.mark.parametrize(("op", "version"), [("Resize", 10), ("Upsample", 9)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resizing_of_older_versions_agrees_with_onnxruntime(op, version, mode, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    images, scales = RNG.normal(size=(1, 2, 3, 4)).astype(np.float32), np.float32([1, 1, 2, 3])
    content = network_files.onnx(
        [Step(op, ["x", "s"], ["y"], {"mode": mode})], {"s": scales}, (1, 2, 3, 4), "y", version
    )
    params, apply_fn = files.network(written(tmp_path, content))
    np.testing.assert_allclose(
        apply_fn(params, images), runtime.InferenceSession(content).run(None, {"x": images})[0], atol=1e-6
    )


REFUSED = {
    "cubic": {"mode": "cubic"},
    "antialias": {"antialias": 1},
    "larger": {"keep_aspect_ratio_policy": "not_larger"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_resizing_that_is_not_supported_is_named(said, tmp_path):
    steps = [Step("Resize", ["x", "", "s"], ["y"], REFUSED[said])]
    content = network_files.onnx(steps, {"s": np.float32([1, 1, 2, 2])}, (1, 1, 2, 2), "y", 18)
    params, apply_fn = files.network(written(tmp_path, content))
    with pytest.raises(errors.SmarkError, match=rf"'Resize'.*{said}"):
        apply_fn(params, np.ones((1, 1, 2, 2), np.float32))


def test_an_image_of_enormous_size_is_refused_before_it_is_made(tmp_path):
    steps = [Step("Resize", ["x", "", "", "s"], ["y"])]
    content = network_files.onnx(steps, {"s": np.array([1, 1, 2**40, 2])}, (1, 1, 2, 2), "y", 13)
    params, apply_fn = files.network(written(tmp_path, content))
    with pytest.raises(errors.SmarkError, match="can be computed"):
        apply_fn(params, np.ones((1, 1, 2, 2), np.float32))


TRANSPOSED = {
    "groups": ((4, 3, 3, 2), {"group": 2, "strides": [2, 3], "pads": [1, 0, 0, 1]}),
    "dilations": ((4, 3, 2, 3), {"dilations": [2, 1], "output_padding": [1, 0], "strides": [2, 1]}),
    "a shape": ((4, 2, 3, 3), {"output_shape": [10, 11], "strides": [2, 2]}),
    "the same": ((4, 2, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "the same, lower": ((4, 2, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolutions_agree_with_onnxruntime(case, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    shape, settings = TRANSPOSED[case]
    images = RNG.normal(size=(2, 4, 5, 6)).astype(np.float32)
    weights = {"w": part(*shape), "b": part(shape[1] * settings.get("group", 1))}
    content = network_files.onnx(
        [Step("ConvTranspose", ["x", "w", "b"], ["y"], settings)], weights, ("n", 4, 5, 6), "y"
    )
    params, apply_fn = files.network(written(tmp_path, content))
    (expected,) = runtime.InferenceSession(content).run(None, {"x": images})
    np.testing.assert_allclose(apply_fn(params, images), expected, rtol=1e-5, atol=1e-5)
