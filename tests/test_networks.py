"""Networks in files: against loops over single numbers, and against the runtimes of their formats where installed."""

import hashlib
import io
import json
import re
import zipfile

import jax
import network_files
import numpy as np
import pytest
from network_files import Step, field, ints

from smark_jax import alignment, carriers, errors, files
from smark_jax.files import formats
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph, onnx, protobuf, pt2

KINDS = ("onnx", "pt2")
NET = network_files.classifier()
IMAGES = np.random.default_rng(1).normal(size=(4, 2, 6, 5)).astype(np.float32)


def written(path, content):
    path = path / "network"
    path.write_bytes(content)
    return path


def content_of(kind, **settings):
    return NET.onnx(**settings) if kind == "onnx" else NET.exported(**settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_computes_what_loops_over_single_numbers_do(kind, tmp_path):
    params, apply_fn = files.network(written(tmp_path, content_of(kind)))
    np.testing.assert_allclose(apply_fn(params, IMAGES), NET.logits(IMAGES), atol=1e-4)
    expected = NET.weights | NET.statistics
    names = {"m": "bn.running_mean", "v": "bn.running_var"}
    found = {names.get(name.removeprefix("buffers/"), name): leaf for name, leaf in params.items()}
    assert found.keys() == expected.keys()
    assert all((leaf == expected[name]).all() and leaf.dtype == np.float32 for name, leaf in found.items())
    more = {**params, "something else": np.zeros(3)}  # such as a leaf that a whole file has besides
    changed = dict(more, **{"fc.bias": params["fc.bias"] + 1})
    np.testing.assert_allclose(apply_fn(changed, IMAGES), apply_fn(more, IMAGES) + 1, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_do_not_carry_and_files_read_gives_the_same_leaves(kind, tmp_path):
    path = written(tmp_path, content_of(kind))
    params = files.network(path).params
    assert {leaf.path for leaf in carriers.select(params).leaves} == NET.weights.keys()
    weights = files.read(path)
    assert weights.format == kind and weights.leaves.keys() == params.keys()
    assert all((weights.leaves[name] == leaf).all() for name, leaf in params.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_jaxpr_is_a_plain_list_that_alignment_follows(kind, tmp_path):
    params, apply_fn = files.network(written(tmp_path, content_of(kind)))
    assert not alignment.trace_graph(apply_fn, params, IMAGES).unfollowed
    names = {equation.primitive.name for equation in jax.make_jaxpr(apply_fn)(params, IMAGES).eqns}
    assert "conv_general_dilated" in names and "jit" not in names
    gradient = jax.jit(jax.grad(lambda p: apply_fn(p, IMAGES).sum()))(params)
    np.testing.assert_allclose(gradient["fc.bias"], np.full(5, 4.0), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_for_a_fixed_number_of_images_takes_its_multiples(kind, tmp_path):
    params, apply_fn = files.network(written(tmp_path, content_of(kind, batch=2)))
    for number in (2, 4):
        np.testing.assert_allclose(apply_fn(params, IMAGES[:number]), NET.logits(IMAGES[:number]), atol=1e-4)
    with pytest.raises(errors.SmarkError, match="a multiple of 2 such images, but got shape"):
        apply_fn(params, IMAGES[:3])


def test_a_softmax_at_the_end_is_left_out(tmp_path):
    params, apply_fn = files.network(written(tmp_path, NET.onnx(softmax=True)))
    np.testing.assert_allclose(apply_fn(params, IMAGES), NET.logits(IMAGES), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_images_and_missing_weights_are_named(kind, tmp_path):
    params, apply_fn = files.network(written(tmp_path, content_of(kind)))
    with pytest.raises(errors.SmarkError, match=r"images of shape \[any 2 6 5\], but got shape \[4, 6, 5, 2\]"):
        apply_fn(params, IMAGES.transpose(0, 2, 3, 1))
    with pytest.raises(errors.SmarkError, match=r"the leaf 'fc\.bias' among params"):
        apply_fn({name: leaf for name, leaf in params.items() if name != "fc.bias"}, IMAGES)


def network_of(tmp_path, steps, tensors=None, image=("n", 3), output="y", version=17, more=b""):
    content = network_files.onnx(steps, tensors or {}, image, output, version, more)
    return files.network(written(tmp_path, content))


def test_what_is_not_supported_is_named_with_its_node(tmp_path):
    steps = [Step("Relu", ["x"], ["a"]), Step("Fancy", ["a"], ["b"], domain="com.example"), Step("Loop", ["b"], ["y"])]
    with pytest.raises(errors.SmarkError, match=r"'com.example.Fancy' in node 'Fancy_of_b', and 'Loop'"):
        network_of(tmp_path, steps)
    params, apply_fn = network_of(tmp_path, [Step("Relu", ["x"], ["y"], {"twist": 3})])
    with pytest.raises(errors.SmarkError, match=r"in node 'Relu_of_y' \('Relu'\): .*twist"):
        apply_fn(params, np.ones((2, 3), np.float32))
    fancy = network_files.exported([("fancy.default", ["x"], "y")], NET.weights, {}, ["s0", 3], "y")
    with pytest.raises(errors.SmarkError, match="'fancy' in node 'y'"):
        files.network(written(tmp_path, fancy))


def test_operations_that_the_result_does_not_need_need_not_be_supported(tmp_path):
    steps = [Step("Relu", ["x"], ["y"]), Step("Fancy", ["y"], ["unused"])]
    params, apply_fn = network_of(tmp_path, steps)
    np.testing.assert_array_equal(apply_fn(params, np.float32([[-1, 0, 2]])), [[0, 0, 2]])


def test_shapes_computed_from_shapes_stay_shapes(tmp_path):
    """As exporters write a flatten: the image's shape, its first entry, joined with -1."""
    steps = [
        Step("Shape", ["x"], ["s"]),
        Step("Gather", ["s", "zero"], ["n"], {"axis": 0}),
        Step("Unsqueeze", ["n", "axes"], ["n1"]),
        Step("Constant", [], ["rest"], {"value": np.array([-1], np.int64)}),
        Step("Concat", ["n1", "rest"], ["shape"], {"axis": 0}),
        Step("Reshape", ["x", "shape"], ["y"]),
    ]
    tensors = {"zero": np.array(0, np.int64), "axes": np.array([0], np.int64)}
    params, apply_fn = network_of(tmp_path, steps, tensors, ("n", 2, 3, "w"))
    images = np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2)
    assert not params
    np.testing.assert_array_equal(apply_fn(params, images), images.reshape(2, -1))


def test_numbers_that_only_set_something_and_constants_of_one_number_are_no_weights(tmp_path):
    steps = [
        Step("Clip", ["x", "low", "high"], ["a"]),
        Step("Mul", ["a", "half"], ["b"]),
        Step("Mul", ["b", "w"], ["y"]),
    ]
    tensors = {name: np.float32(value) for name, value in {"low": -1, "high": 6, "half": 0.5}.items()}
    params, apply_fn = network_of(tmp_path, steps, {**tensors, "w": np.float32([1, -2, 3])})
    assert params.keys() == {"w"}
    np.testing.assert_allclose(apply_fn(params, np.float32([[-2, 2, 8]])), [[-0.5, -2, 9]])
    leaves = files.read(tmp_path / "network").leaves
    assert leaves.keys() == {"w", "buffers/low", "buffers/high", "buffers/half"}
    assert not any(carriers.roles(leaves)[name].carries for name in leaves if name != "w")


def test_tensors_are_read_however_their_numbers_are_coded():
    def model(content):
        return network_files.onnx([Step("Add", ["x", "w"], ["y"])], {}, ("n", 3), "y", more=field(5, content))

    values, head = np.float32([1.5, -2, 0.25]), field(1, 3) + field(8, "w")
    halves = values.astype(np.float16)
    coded = {
        "raw": head + field(2, 1) + field(9, values.tobytes()),
        "packed floats": head + field(2, 1) + field(4, values.tobytes()),
        "floats one by one": head + field(2, 1) + b"".join(field(4, float(value)) for value in values),
        "doubles": head + field(2, 11) + field(10, values.astype("f8").tobytes()),
        "halves by their bits": head + field(2, 10) + b"".join(field(5, int(bits)) for bits in halves.view(np.uint16)),
    }
    for how, content in coded.items():
        found = onnx.load(Source(model(content)), 2**20).tensors["w"]
        np.testing.assert_array_equal(found.array.astype(np.float32), values, how)
    whole = field(1, 3) + field(8, "w") + field(2, 7) + field(7, b"".join(map(network_files.varint, (5, -1, 2**40))))
    assert onnx.load(Source(model(whole)), 2**20).tensors["w"].array.tolist() == [5, -1, 2**40]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_its_base_but_for_the_numbers_of_changed_leaves(kind, tmp_path):
    base = written(tmp_path, content_of(kind))
    leaves = files.read(base).leaves
    changed = {name: leaf + 1 if name.endswith("weight") else leaf for name, leaf in leaves.items()}
    digest = files.write(tmp_path / "copy", changed, like=base)
    copy, old = (np.frombuffer((tmp_path / name).read_bytes(), np.uint8) for name in ("copy", "network"))
    assert len(copy) == len(old) and 0 < (copy != old).sum() <= 4 * sum(leaf.size for leaf in leaves.values()) + 100
    found = files.read(tmp_path / "copy")
    assert found.sha256 == digest and found.leaves.keys() == leaves.keys()
    assert all((found.leaves[name] == leaf).all() for name, leaf in changed.items())
    params, apply_fn = files.network(tmp_path / "copy")
    weights = {name: changed[name] for name in NET.weights}
    np.testing.assert_allclose(apply_fn(params, IMAGES), NET._replace(weights=weights).logits(IMAGES), rtol=1e-3)
    assert files.write(tmp_path / "same", leaves, like=base) == hashlib.sha256(base.read_bytes()).hexdigest()


def test_numbers_in_a_file_beside_a_network_are_read_from_it(tmp_path):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    add = [Step("Add", ["x", "w"], ["y"])]

    def model(**entries):
        head = field(8, "w") + field(1, 2) + field(1, 3) + field(2, 1) + field(14, 1)
        head += b"".join(field(13, field(1, key) + field(2, value)) for key, value in entries.items())
        return written(tmp_path, network_files.onnx(add, {}, ("n", 3), "y", more=field(5, head)))

    (tmp_path / "weights").write_bytes(b"1234" + weight.tobytes() + b"more")
    path = model(location="weights", offset="4", length="24")
    np.testing.assert_array_equal(files.read(path).leaves["w"], weight)
    assert onnx.places(Source(path.read_bytes(), path))["w"] == ("weights", 4, np.float32, (2, 3), (12, 4))
    refused = {
        "which is not beside it": {"location": "../weights"},
        "not beside it": {"location": str(tmp_path / "weights")},
        "cannot be opened": {"location": "none"},
        "28 bytes of data": {"location": "weights", "offset": "4"},
        "behind the end": {"location": "weights", "offset": "12", "length": "24"},
        "at byte '-4'": {"location": "weights", "offset": "-4"},
    }
    for said, entries in refused.items():
        with pytest.raises(errors.Unreadable, match=said):
            files.read(model(**entries))


def test_one_piece_of_another_file_does_not_become_many_tensors(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(4000))
    head = field(1, 1000) + field(2, 1) + field(14, 1) + field(13, field(1, "location") + field(2, "weights"))
    many = b"".join(field(5, head + field(8, f"w{number}")) for number in range(100))
    path = written(tmp_path, network_files.onnx([Step("Relu", ["x"], ["y"])], {}, ("n", 3), "y", more=many))
    assert len(files.read(path, max_bytes=400_000).leaves) == 100
    with pytest.raises(errors.Unreadable, match="more bytes than are allowed"):
        files.read(path, max_bytes=399_000)


def test_whole_numbers_of_four_bits_are_read(tmp_path):
    numbers = np.array([[-8, 7, -1], [0, 3, -5]])
    nibbles = [int(number) & 15 for number in numbers.reshape(-1)]
    packed = bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))
    content = field(8, "w") + field(1, 2) + field(1, 3) + field(2, 22) + field(9, packed)
    network = network_files.onnx([Step("Relu", ["x"], ["y"])], {}, ("n", 3), "y", more=field(5, content))
    found = onnx.load(Source(network), 2**20).tensors["w"]
    np.testing.assert_array_equal(found.array.astype(int), numbers)


def test_a_tensor_that_is_changed_in_place_is_new_to_what_follows(tmp_path):
    """The classifier's relu_ shows the plain case; where a view of the old one is used later, the file is refused."""
    steps = [("view.default", ["x", ints(-1, 3)], "v"), ("relu_.default", ["x"], "r"), ("add.Tensor", ["v", "r"], "y")]
    content = network_files.exported(steps, {"w": np.ones(2, np.float32)}, {}, ["s0", 3], "y")
    with pytest.raises(errors.Unreadable, match="'v' is changed in place, and a view of it used"):
        files.network(written(tmp_path, content))
    steps[2] = ("add.Tensor", ["x", "r"], "y")
    content = network_files.exported(steps, {"w": np.ones(2, np.float32)}, {}, ["s0", 3], "y")
    params, apply_fn = files.network(written(tmp_path, content))
    np.testing.assert_array_equal(apply_fn(params, np.float32([[-1, 2, 3]])), [[0, 4, 6]])


def config(change):
    """The classifier's list of tensors with one entry changed."""
    archive = zipfile.ZipFile(io.BytesIO(NET.exported()))
    found = json.loads(archive.read("net/data/weights/model_weights_config.json"))
    change(found["config"]["fc.bias"])
    return {"data/weights/model_weights_config.json": json.dumps(found).encode()}


HOSTILE = {
    "a pickled tensor": (config(lambda entry: entry.update(use_pickle=True)), "pickled"),
    "strides beyond the numbers": (config(lambda e: e["tensor_meta"].update(strides=[{"as_int": 2}])), "more numbers"),
    "an offset beyond": (config(lambda e: e["tensor_meta"].update(storage_offset={"as_int": 1})), "more numbers"),
    "one number as many": (
        config(lambda e: e["tensor_meta"].update(sizes=[{"as_int": 2**40}], strides=[{"as_int": 0}])),
        "more numbers",
    ),
    "negative strides": (config(lambda e: e["tensor_meta"].update(strides=[{"as_int": -1}])), "strides"),
    "a size that is text": (config(lambda e: e["tensor_meta"].update(sizes=[{"as_int": "5"}])), "the shape"),
    "a name without member": (config(lambda entry: entry.update(path_name="../../etc/passwd")), "no member"),
    "no list of tensors": ({"data/weights/model_weights_config.json": None}, "no member"),
    "a list that is none": ({"data/weights/model_weights_config.json": b"[1]"}, "not as PyTorch writes it"),
    "no JSON": ({"models/model.json": b"{"}, "not JSON"),
    "an empty graph": ({"models/model.json": b"{}"}, "not as PyTorch writes it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_forged_program_is_refused(case, tmp_path):
    change, said = HOSTILE[case]
    with pytest.raises(errors.Unreadable, match=said):
        files.network(written(tmp_path, NET.exported(**change)))


def test_a_forged_onnx_file_is_refused(tmp_path):
    weights = {"w": np.ones(3, np.float32)}
    add = [Step("Add", ["x", "w"], ["y"])]
    cases = {
        "which nothing before it makes": network_files.onnx([Step("Add", ["x", "v"], ["y"])], weights, ("n", 3), "y"),
        "made by no node": network_files.onnx(add, weights, ("n", 3), "z"),
        "of data type 8": network_files.onnx(add, {}, ("n", 3), "y", more=field(5, field(8, "w") + field(2, 8))),
        "12 bytes of data": network_files.onnx(
            add, {}, ("n", 3), "y", more=field(5, field(8, "w") + field(1, 2**40) + field(2, 1) + field(9, bytes(12)))
        ),
        "not printable": network_files.onnx(add, {"w\n": weights["w"]}, ("n", 3), "y"),
        "it has 2 inputs": network_files.onnx(
            add, weights, ("n", 3), "y", more=field(11, network_files.value_info("more", (3,)))
        ),
        "a sparse tensor": network_files.onnx(add, weights, ("n", 3), "y", more=field(15, b"")),
    }
    for said, content in cases.items():
        with pytest.raises(errors.Unreadable, match=said) as refusal:
            files.network(written(tmp_path, content))
        assert "\n" not in str(refusal.value)


def test_weights_alone_are_no_network(tmp_path):
    files.write(tmp_path / "weights", NET.weights)
    with pytest.raises(errors.Unreadable, match="it is safetensors, and holds no network"):
        files.network(tmp_path / "weights")


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_refused_or_read_and_never_raise_anything_else(kind, tmp_path):
    ends = network_files.ends_of_broken(content_of(kind), lambda broken: written(tmp_path, broken), number=300)
    assert len(ends) == 4  # the control: some files were read, and some were not, by both


GROWING = {
    "ConstantOfShape": [Step("ConstantOfShape", ["huge"], ["c"]), Step("Add", ["x", "c"], ["y"])],
    "Expand": [Step("Expand", ["x", "huge"], ["y"])],
    "Tile": [Step("Tile", ["x", "huge"], ["y"])],
    "Range": [
        Step("Range", ["zero", "end", "one"], ["c"]), Step("Cast", ["c"], ["d"], {"to": 1}),
        Step("Add", ["x", "d"], ["y"]),
    ],
    "Pad": [Step("Pad", ["x", "wide"], ["y"])],
    "the product of all with all": [
        Step("Reshape", ["many", "column"], ["c"]), Step("Mul", ["c", "many"], ["d"]), Step("ReduceSum", ["d"], ["e"]),
        Step("Cast", ["e"], ["f"], {"to": 1}), Step("Add", ["x", "f"], ["y"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", GROWING)
def test_a_graph_that_asks_for_enormous_arrays_is_refused_before_they_are_made(case, tmp_path):
    whole = lambda *numbers: np.array(numbers, np.int64)  # noqa: E731
    tensors = {
        "huge": whole(2**20, 2**20), "wide": whole(0, 2**40, 0, 0), "zero": np.array(0), "one": np.array(1),
        "end": np.array(2**40), "many": np.arange(2**16), "column": whole(-1, 1),
    }  # fmt: skip
    params, apply_fn = network_of(tmp_path, GROWING[case], tensors, ("n", 1))
    with pytest.raises(errors.SmarkError, match=r"values in a result|can be computed"):
        apply_fn(params, np.ones((1, 1), np.float32))


MANY, NESTED = 2**40, []
for _ in range(600):
    NESTED = [NESTED]
GROWING_TOO = {
    "cells": [("adaptive_avg_pool2d.default", ["x", ints(MANY, 1)], "y")],
    "windows": [
        ("constant_pad_nd.default", ["x", ints(MANY, MANY)], "a"),
        ("avg_pool2d.default", ["a", ints(1, MANY), ints(1, 1)], "y"),
    ],
    "pieces": [("expand.default", ["x", ints(-1, -1, 2**20, -1)], "a"), ("unbind.int", ["a", {"as_int": 2}], "y")],
    "more pieces": [
        ("expand.default", ["x", ints(-1, -1, 2**20, -1)], "a"),
        ("split.Tensor", ["a", {"as_int": 1}, {"as_int": 2}], "y"),
    ],
    "reflections": [("pad.default", ["x", ints(MANY, 0), {"as_string": "reflect"}], "y")],
    "a causal mask": [
        ("expand.default", ["x", ints(-1, -1, 2**20, -1)], "a"),
        (
            "scaled_dot_product_attention.default",
            ["a", "a", "a", {"as_none": True}, {"as_float": 0.0}, {"as_bool": True}],
            "y",
        ),
    ],
    "a list in a list in a list": [("view.default", ["x", {"as_ints": NESTED}], "y")],
}


@pytest.mark.parametrize("case", GROWING_TOO)
def test_a_program_that_asks_for_too_much_is_refused_too(case, tmp_path):
    content = network_files.exported(GROWING_TOO[case], {"w": np.ones(2, np.float32)}, {}, ["s0", 1, 1, 2], "y")
    with pytest.raises(errors.SmarkError, match=r"values in a result|can be computed|as PyTorch writes it|not JSON"):
        params, apply_fn = files.network(written(tmp_path, content))
        apply_fn(params, np.ones((1, 1, 1, 2), np.float32))


def test_an_input_whose_shape_the_file_does_not_tell_takes_any(tmp_path):
    params, apply_fn = network_of(tmp_path, [Step("Relu", ["x"], ["y"])], image=())
    assert apply_fn(params, np.ones((2, 3), np.float32)).shape == (2, 3)


def test_what_parsing_may_create_is_limited(monkeypatch, tmp_path):
    content = NET.onnx()
    fields = sum(1 for _ in walked(protobuf.Reader(content), None, 0))
    assert 100 < fields < 400
    for limit, said in (("_MAX_FIELDS", "fields"), ("_MAX_TEXT", "bytes of text")):
        with monkeypatch.context() as patch:
            patch.setattr(protobuf, limit, 50)
            with pytest.raises(errors.Unreadable, match=said):
                onnx.load(Source(content), 2**20)
    with monkeypatch.context() as patch:
        patch.setattr(graph, "MAX_NODES", 5)
        for kind in KINDS:
            with pytest.raises(errors.Unreadable, match="more than 5"):
                files.network(written(tmp_path, content_of(kind)))
    with pytest.raises(errors.Unreadable, match="unpacks to"):
        pt2.load(Source(NET.exported()), 500)


def walked(reader, span, depth):
    """All fields of a message and of what may be messages in it."""
    for number, wire, _, place in reader.fields(span):
        yield number
        if wire == protobuf.BYTES and depth < 3 and number in (1, 2, 5, 7, 8, 11, 12):
            try:
                yield from list(walked(reader, place, depth + 1))
            except errors.Unreadable:
                continue


def test_a_file_of_another_format_is_not_taken_for_onnx(tmp_path):
    """The length of a safetensors header may begin with the byte with which an ONNX file begins."""
    path = tmp_path / "weights"
    for size in range(1, 40):
        files.write(path, {"w" * size: np.ones(3, np.float32)})
        assert formats.of(path.read_bytes()).name == "safetensors"
    assert not onnx.matches(b"\x08\x08") and not onnx.matches(b"hello") and not onnx.matches(b"\x82\xa1a\x01\xa1b\x02")


# --- Against the runtimes of the formats

DRAW = np.random.default_rng(2).normal
WHOLE = lambda *numbers: np.array(numbers, np.int64)  # noqa: E731
PIXELS = DRAW(size=(2, 4, 7, 6)).astype(np.float32)
POSITIVE = np.abs(PIXELS) + np.float32(0.1)
PART = lambda *shape: DRAW(size=shape).astype(np.float32)  # noqa: E731
# The operator, further inputs, settings, and where needed another image or version.
CASES = {
    **{name: (name, [], {}) for name in "Relu Sigmoid Tanh Exp Abs Neg Floor Ceil Round Erf Sin Cos".split()},
    **{name: (name, [], {}) for name in "Softplus Softsign HardSwish Identity GlobalAveragePool GlobalMaxPool".split()},
    **{name: (name, [PART(4, 1, 1)], {}) for name in "Add Sub Mul Max Min".split()},
    **{name: (name, [], {"axes": [1, 3], "keepdims": 0}) for name in "ReduceMean ReduceMax ReduceMin ReduceL2".split()},
    "Div": ("Div", [PART(6)], {}),
    "Sqrt": ("Sqrt", [], {}, POSITIVE),
    "Log": ("Log", [], {}, POSITIVE),
    "Reciprocal": ("Reciprocal", [], {}, POSITIVE),
    "Pow": ("Pow", [np.float32([2.5])], {}, POSITIVE),
    "ReduceSum": ("ReduceSum", [WHOLE(-1)], {}),
    "LeakyRelu": ("LeakyRelu", [], {"alpha": 0.2}),
    "PRelu": ("PRelu", [PART(4, 1, 1)], {}),
    "Elu": ("Elu", [], {"alpha": 0.7}),
    "Selu": ("Selu", [], {}),
    "HardSigmoid": ("HardSigmoid", [], {"alpha": 0.3}),
    "Mish": ("Mish", [], {}, PIXELS, 18),
    "Gelu": ("Gelu", [], {"approximate": "tanh"}, PIXELS, 20),
    "Clip": ("Clip", [np.float32(-0.5), np.float32(0.7)], {}),
    "Clip 6": ("Clip", [], {"min": -0.5, "max": 0.7}, PIXELS, 10),
    "LogSoftmax": ("LogSoftmax", [], {"axis": 1}),
    "LogSoftmax 11": ("LogSoftmax", [], {"axis": 2}, PIXELS, 11),
    "Transpose": ("Transpose", [], {"perm": [0, 2, 3, 1]}),
    "Flatten": ("Flatten", [], {"axis": 2}),
    "Reshape": ("Reshape", [WHOLE(0, -1, 3)], {}),
    "Squeeze": ("Squeeze", [WHOLE(1)], {}, PIXELS[:, :1]),
    "Unsqueeze": ("Unsqueeze", [WHOLE(0, -1)], {}),
    "Slice": ("Slice", [WHOLE(-1, 0), WHOLE(-(2**62), 2**62), WHOLE(2, 3), WHOLE(-2, 2)], {}),
    "Slice 9": ("Slice", [], {"starts": [1], "ends": [-1], "axes": [3]}, PIXELS, 9),
    "Gather": ("Gather", [WHOLE(3, -1, 0)], {"axis": 1}),
    "Gather one": ("Gather", [np.array(-2)], {"axis": 2}),
    "Concat": ("Concat", [PART(2, 3, 7, 6)], {"axis": 1}),
    "Expand": ("Expand", [WHOLE(2, 1, 4, 1, 6)], {}, PIXELS[:, :, :1]),
    "Tile": ("Tile", [WHOLE(1, 2, 1, 3)], {}),
    "Pad": ("Pad", [WHOLE(0, 0, 1, 2, 0, 1, 0, 3), np.float32(1.5)], {}),
    "Pad reflect": ("Pad", [WHOLE(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
    "Pad edge 10": ("Pad", [], {"mode": "edge", "pads": [0, 0, 1, 2, 0, 0, 3, 1]}, PIXELS, 10),
    "MatMul": ("MatMul", [PART(6, 5)], {}),
    "Gemm": ("Gemm", [PART(3, 6), PART(3)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, PIXELS[0, 0]),
    "Conv": ("Conv", [PART(6, 2, 3, 2), PART(6)], {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}),
    "Conv dilated": ("Conv", [PART(3, 4, 3, 2)], {"dilations": [2, 3]}),
    "Conv same": ("Conv", [PART(3, 4, 4, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "MaxPool": ("MaxPool", [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    "MaxPool ceil": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "AveragePool": ("AveragePool", [], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 1, 1, 0]}),
    "AveragePool pad": ("AveragePool", [], {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1}),
    "AveragePool ceil": ("AveragePool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "BatchNormalization": ("BatchNormalization", [PART(4), PART(4), PART(4), POSITIVE[0, :, 0, 0]], {"epsilon": 1e-3}),
    "LayerNormalization": ("LayerNormalization", [PART(7, 6), PART(7, 6)], {"axis": 2, "epsilon": 1e-3}),
    "GroupNormalization": ("GroupNormalization", [PART(4), PART(4)], {"num_groups": 2}, PIXELS, 21),
    "InstanceNormalization": ("InstanceNormalization", [PART(4), PART(4)], {"epsilon": 1e-3}),
    "LRN": ("LRN", [], {"size": 3, "alpha": 0.01, "bias": 2.0}),
    "Dropout": ("Dropout", [np.float32(0.3)], {}),
}  # fmt: skip


def together(version):
    """One model of all cases of a version, whose result is their results end to end, and the cases' names."""
    steps, tensors, names = [], {"flat": WHOLE(-1)}, []
    for name, (op, inputs, settings, *others) in CASES.items():
        image, its_version = (*others, *(PIXELS, 17)[len(others) :])
        if its_version == version:
            arguments = [f"{name}, argument {number}" for number in range(1 + len(inputs))]
            tensors |= {key: np.asarray(value) for key, value in zip(arguments, [image, *inputs], strict=True)}
            steps += [Step(op, arguments, [name], settings), Step("Reshape", [name, "flat"], [f"{name}, flat"])]
            names.append(name)
    steps.append(Step("Concat", [f"{name}, flat" for name in names], ["y"], {"axis": 0}))
    outputs = b"".join(field(12, field(1, name)) for name in names)
    return network_files.onnx(steps, tensors, (1,), "y", version, outputs), names


@pytest.mark.parametrize("version", [9, 10, 11, 17, 18, 20, 21])
def test_operators_agree_with_onnx_runtime(version, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    content, names = together(version)
    image = np.zeros(1, np.float32)
    _, *expected = runtime.InferenceSession(content).run(None, {"x": image})
    params, apply_fn = files.network(written(tmp_path, content))
    ends = np.cumsum([result.size for result in expected])
    found = np.split(np.asarray(apply_fn(params, image)), ends)
    assert names and not found.pop().size
    for name, result, flat in zip(names, expected, found, strict=True):
        np.testing.assert_allclose(flat, result.reshape(-1), rtol=1e-4, atol=1e-5, err_msg=name)


def test_exported_programs_agree_with_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    nn, functional = torch.nn, torch.nn.functional
    torch.manual_seed(0)

    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
            self.group, self.slopes = nn.GroupNorm(2, 8), nn.PReLU(8)
            self.attention, self.layer = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
            self.head = nn.Linear(8, 5)
            self.register_buffer("centre", torch.rand(1, 3, 1, 1))

        def forward(self, x):
            x = self.norm(self.conv(x - self.centre))
            x = functional.hardswish(x, inplace=True) + functional.gelu(self.group(x))
            a, b = self.slopes(x).chunk(2, 1)
            x = functional.avg_pool2d(torch.cat([b, functional.silu(a)], 1), 3, 2, 1, ceil_mode=True)
            x = functional.adaptive_avg_pool2d(functional.pad(x, (1, 0, 2, 1)), (3, 2)).flatten(2).transpose(1, 2)
            x = x + self.attention(self.layer(x), x, x, need_weights=False)[0]
            return self.head(x.mean(1) * torch.sigmoid(x[:, 0]))

    model, images = Pieces().eval(), torch.randn(4, 3, 16, 16)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    for number, dynamic in enumerate((({0: torch.export.Dim("b")},), None)):
        program = torch.export.export(model, (images[:2],), dynamic_shapes=dynamic)
        torch.export.save(program, tmp_path / f"{number}.pt2")
        params, apply_fn = files.network(tmp_path / f"{number}.pt2")
        np.testing.assert_allclose(apply_fn(params, images.numpy()), model(images).detach().numpy(), atol=1e-5)
        state = model.state_dict()
        assert {re.sub("^buffers/", "", name) for name in params} == {n for n in state if "num_batches" not in n}
        assert not any("running" in leaf.path or "centre" in leaf.path for leaf in carriers.select(params).leaves)
