"""Strangers' networks and Keras files that would take far more time or memory than their size."""

import h5py
import network_files
import numpy as np
import pytest
from memory import counted, peak
from network_files import Step, field
from test_keras import called, computed, model_of

from smark_jax import errors, files
from smark_jax.files import _hdf5, _keras, _limits
from smark_jax.files._sources import Source
from smark_jax.files.networks import keras, onnx, protobuf

MB = 2**20
RELU = [Step("Relu", ["x"], ["y"])]


def refused(run, match, kind=errors.Unreadable):
    def wrapped():
        with pytest.raises(kind, match=match):
            run()

    return wrapped


def tensor(kind, shape, *parts):
    """A tensor that is coded by hand: the number of its type, its shape, and its numbers."""
    return b"".join(field(1, n) for n in shape) + field(2, kind) + field(8, "w") + b"".join(parts)


WHOLE, HALF, FLOATS = np.ones(2 * MB, np.int8), field(9, bytes(MB)), field(4, bytes(2 * MB))
MANY = {
    # What is in the file, and how many bytes may be made of it before it is refused.
    "float32 of int8": ([Step("DequantizeLinear", ["w", "s"], ["r"])], [network_files.tensor("w", WHOLE)], 4 * MB),
    "numbers of four bits": ([], [tensor(22, [2 * MB], HALF)], 4 * MB),
    "float64 of float32": ([], [tensor(11, [MB], FLOATS, FLOATS)], 4 * MB),
}


@pytest.mark.parametrize("case", MANY)
def test_what_numbers_stand_for_is_counted_before_it_is_made(case):
    steps, tensors, most = MANY[case]
    more = b"".join(field(5, one) for one in tensors)
    content = network_files.onnx([*steps, *RELU], {"s": np.float32(1)}, ("n", 3), "y", more=more)
    assert peak(refused(lambda: onnx.read(Source(content), most), "more bytes")) < len(content) + MB
    assert onnx.read(Source(content), 8 * most)


def test_scales_that_do_not_fit_are_not_converted_for_each_node():
    """Twenty nodes took twenty times as long as one, at four times the size of the scales."""
    steps = [Step("DequantizeLinear", ["w", "s"], [f"r{n}"]) for n in range(20)]
    tensors = {"w": np.ones(1, np.int8), "s": np.ones(4 * MB, np.uint8)}
    content = network_files.onnx([*steps, *RELU], tensors, ("n", 3), "y")
    assert peak(lambda: onnx.read(Source(content), _limits.MAX_BYTES)) < 5 * MB


def test_a_setting_is_no_list_of_millions(monkeypatch):
    monkeypatch.setattr(protobuf, "_MAX_FIELDS", 1_000)
    for number, said in ((7, "fields and small numbers"), (9, None)):
        setting = field(5, field(1, "a") + field(20, 6) + field(number, np.zeros(MB, np.float32).tobytes()))
        node = field(1, field(1, "x") + field(2, "y") + field(4, "Relu") + setting)
        content = network_files.onnx([], {"w": np.ones((2, 2), np.float32)}, ("n", 3), "y", more=node)
        run = lambda content=content: onnx.read(Source(content), 8 * MB)  # noqa: E731
        assert peak(refused(run, said) if said else run) < MB


def test_a_setting_without_its_number_is_refused():
    """A whole number that is packed like a list, of which nothing is left."""
    setting = field(5, field(1, "axis") + field(20, 2) + field(3, b""))
    node = field(1, field(1, "x") + field(2, "y") + field(4, "Softmax") + setting)
    content = network_files.onnx([], {"w": np.ones((2, 2), np.float32)}, ("n", 3), "y", more=node)
    refused(lambda: onnx.read(Source(content), MB), "the number of 'a setting'")()


def test_a_product_of_very_many_factors_is_no_product_of_two():
    steps = [
        Step("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), Step("Cast", ["p"], ["c"]),
        Step("Mul", ["c"] * 5_000, ["m"]), *[Step("MatMulInteger", ["q", "w"], ["p"])] * 300,
    ]  # fmt: skip
    content = network_files.onnx(steps, {"w": np.ones((2, 2), np.float32)}, ("n", 3), "y")
    model = counted(2_000_000, lambda: onnx.onnx_model.parsed(Source(content), MB))
    counted(300_000, lambda: onnx.onnx_quantised.lowered(model, MB))


def written(tmp_path, content):
    (tmp_path / "network").write_bytes(content)
    return tmp_path / "network"


def test_a_node_takes_few_values(tmp_path):
    """Thirty kilobytes asked for 160 MB: the same 4,096 numbers, put together again and again."""
    steps = [Step("Concat", ["c"] * 5_000, ["z"], {"axis": 0}), Step("Add", ["x", "z"], ["y"])]
    content = network_files.onnx(steps, {"c": np.ones(4096, np.int64)}, ("n", 3), "y")
    with pytest.raises(errors.Unreadable, match="takes more than 4,096 values"):
        files.network(written(tmp_path, content))


def test_a_shape_is_no_list_of_millions(tmp_path):
    tensors = {"c": np.ones(MB, np.int64), "w": np.ones((2, 2), np.float32)}
    content = network_files.onnx([Step("Reshape", ["x", "c"], ["y"])], tensors, ("n", 3), "y")
    params, apply_fn = files.network(written(tmp_path, content))
    apply_fn_refused = refused(
        lambda: apply_fn(params, np.ones((1, 3), np.float32)), "whole numbers", errors.SmarkError
    )
    assert peak(apply_fn_refused) < 8 * MB


TEXT, TEN = {"as_string": "a"}, {"as_int": 10}
SIZES = {
    "a text many times": [("mul.Tensor", [TEXT, {"as_int": 2**24}], "a")],
    "a list many times": [("mul.Tensor", [network_files.ints(1), {"as_int": 2**24}], "a")],
    "a text many times, by a factor": [("add.Tensor", [TEN, TEXT, {"as_int": 2**24}], "a")],
    "a number of many digits": [("pow.Scalar", [TEN, {"as_int": 10**7}], "a")],
}


@pytest.mark.parametrize("case", SIZES)
def test_python_calculates_with_numbers_alone(case, tmp_path):
    steps = [*SIZES[case], ("add.Tensor", ["x", "a"], "y")]
    path = written(tmp_path, network_files.exported(steps, {"w": np.ones(2, np.float32)}, {}, ["s0", 2], "y"))
    params, apply_fn = files.network(path)
    run = lambda: apply_fn(params, np.ones((1, 2), np.float32))  # noqa: E731
    assert peak(refused(run, "expected an array", errors.SmarkError)) < 8 * MB


def test_python_calculates_with_sizes_alone(tmp_path):
    from smark_jax.files.networks import aten

    for name in ("add", "mul"):
        apply = aten.OPERATORS[f"_operator.{name}"]
        assert apply(2, 3) == {"add": 5, "mul": 6}[name]
        for odd in ("a", [1], 2**63):
            with pytest.raises(ValueError, match="expected an array"):
                apply(odd, 2)
    with pytest.raises(ValueError, match="expected an array"):
        aten.OPERATORS["_operator.mul"](2**40, 2**40)


# --- Keras


def test_a_model_that_is_called_again_and_again_is_counted_with_its_arguments(monkeypatch, tmp_path):
    monkeypatch.setattr(keras, "_MAX_PARTS", 2_000)
    inner = model_of(
        [called("Rescaling", [["i", 0, 0]] * 50, name="r", scale=1.0, offset=0.0)], "Functional",
        input_layers=["i", 0, 0], output_layers=["r", 0, 0],
    )  # fmt: skip
    outer = [{"class_name": "Functional", "config": {**inner["config"], "name": f"m{n}"}} for n in range(20)]
    with pytest.raises(errors.Unreadable, match="far too long"):
        computed(tmp_path, model_of(outer), [[1.0]])


def compressed(path, shape, **settings):
    with h5py.File(path, "w") as file:
        group = file.create_group("layers/dense/vars")
        group.create_dataset("0", data=np.ones(shape, settings.pop("dtype")), **settings)
        group.create_dataset("1", data=np.zeros(shape[-1], np.float32))
        group.create_dataset("2", data=np.ones(shape[-1], np.float64))
    return Source(path.read_bytes())


def test_an_int8_kernel_counts_as_the_float32_that_it_stands_for(tmp_path):
    """A file of a few kilobytes: int8 kernels pack well."""
    source = compressed(tmp_path / "w.h5", (2**15, 64), dtype=np.int8, chunks=(2**12, 64), compression="gzip")
    assert len(source.data) < MB / 8
    assert peak(refused(lambda: _keras.read(source, 4 * MB), "larger than is allowed")) < MB
    assert peak(lambda: _keras.read(source, 16 * MB)) < 12 * MB
    assert _keras.read(source, 16 * MB)["dense/kernel"].dtype == np.float32


@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_an_array_in_chunks_is_in_memory_once_beside_the_file(order, tmp_path):
    source = compressed(tmp_path / "w.h5", (2**14, 64), dtype=order, chunks=(2**8, 64))
    found = []
    assert peak(lambda: found.append(_keras.read(source, 16 * MB))) < 5 * MB
    assert (found[0]["dense/kernel"] == 1).all() and found[0]["dense/kernel"].dtype == np.float32


def test_texts_of_hdf5_have_a_limit_together(monkeypatch, tmp_path):
    """A thousand attributes may lie at the same bytes."""
    monkeypatch.setattr(_hdf5, "_MAX_TEXT", 500)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for number in range(10):
            group = file.create_group(f"layers/dense_{number}/vars")
            group.attrs["name"] = "a" * 100
            group.create_dataset("0", data=np.ones((2, 2), np.float32))
    with pytest.raises(errors.Unreadable, match="texts are too long"):
        files.read(tmp_path / "w.h5")


def test_a_chunk_goes_through_a_filter_once(monkeypatch, tmp_path):
    source = compressed(tmp_path / "w.h5", (64, 64), dtype=np.float32, chunks=(8, 64), shuffle=True)
    assert isinstance(_keras.read(source, MB)["dense/kernel"], np.ndarray)
    monkeypatch.setattr(_hdf5.messages, "filters", lambda message: [_hdf5.messages.SHUFFLE] * 2)
    assert isinstance(_keras.read(source, MB)["dense/kernel"], _limits.Foreign)
