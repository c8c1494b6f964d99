"""The machine that reads pickles without running them: like Python's on plain values, and bounded on hostile ones."""

import pickle
import pickletools
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import counted, peak

from smark_jax import errors
from smark_jax.files import _limits, _pickle, _tensors
from smark_jax.files._pickle import Blob, Global, Object, Persistent

MB = 2**20
PLAIN = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(max_size=5)
SETS = st.sets(st.integers(0, 9), max_size=3) | st.frozensets(st.integers(0, 9), max_size=3)
VALUES = st.recursive(
    PLAIN | st.binary(max_size=300) | SETS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner, inner, inner)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(1 - 2**60, 2**60 - 1), inner, max_size=3)
    ),
    max_leaves=12,
)


def made(value, data):
    """What the pickle would have made; of the calls, those that protocols 2 and 3 need for bytes and sets."""
    if isinstance(value, Blob):
        return data[value.start : value.end].decode() if value.text else data[value.start : value.end]
    if isinstance(value, Object):
        arguments = [made(argument, data) for argument in value.arguments]
        if value.name == "_codecs.encode":
            return arguments[0].encode(arguments[1])
        return {"bytes": bytes, "set": set, "frozenset": frozenset}[value.name.split(".")[1]](*arguments)
    if isinstance(value, dict):
        return {key: made(part, data) for key, part in value.items()}
    return type(value)(made(part, data) for part in value) if isinstance(value, list | tuple) else value


def as_lists(value):
    """Sets as sorted lists, since sets of protocol 4 are lists here."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {key: as_lists(part) for key, part in value.items()}
    if isinstance(value, list) and value and all(type(part) is int for part in value):
        return sorted(value)
    return type(value)(as_lists(part) for part in value) if isinstance(value, list | tuple) else value


@settings(deadline=None, max_examples=60)
@given(value=VALUES, protocol=st.integers(2, 5))
def test_plain_values_are_what_python_makes_of_them(value, protocol):
    data = pickle.dumps([value, value, "x" * 5_000], protocol)  # the second one from the memo, and a long text
    found = _pickle.load(b"__" + data, 2)
    assert found.end == len(data) + 2 and found.references == []
    assert as_lists(made(found.value, b"__" + data)) == as_lists(pickle.loads(data))


def test_calls_become_objects_with_what_would_have_been_set_on_them():
    class Net:
        def __reduce__(self):
            return print, (1, "a"), {"w": 2}, iter([3, 4]), iter([("k", 5)])

    for protocol in (2, 4):
        found = _pickle.load(pickle.dumps(Net(), protocol)).value
        assert found.name.endswith("builtin__.print" if protocol == 2 else "builtins.print")
        assert (found.arguments, found.state, found.items, found.entries) == ((1, "a"), {"w": 2}, [3, 4], {"k": 5})
    outside = _pickle.load(b"\x80\x02(X\x01\x00\x00\x00aK\x07tQ.")
    assert isinstance(outside.value, Persistent) and outside.value.reference == ("a", 7)
    assert outside.references == [outside.value]
    loop = _pickle.load(b"\x80\x02]q\x00h\x00a.").value
    assert loop == [loop] and loop[0] is loop
    keys = _pickle.load(pickle.dumps({(1, 2): 3, None: 4, "a": 5, 6: 7})).value
    assert keys == {"a": 5, 6: 7}  # no leaf has a name that is no text and no number
    assert _pickle.load(pickle.dumps({2**60: 1, -(2**60): 2, 2**60 - 1: 3})).value == {2**60 - 1: 3}  # nor a larger one
    assert _pickle.load(b"\x80\x02cos\nsystem\n.").value == Global("os.system")


def test_instructions_that_make_values_are_known_and_no_others():
    unknown = {op.name for op in pickletools.opcodes if ord(op.code) not in _pickle._STEPS} - {"STOP"}
    assert unknown == {
        *("INT", "LONG", "STRING", "UNICODE", "FLOAT", "PUT", "GET"),  # of protocol 0, as text
        *("INST", "OBJ", "PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"),
    }
    for op in pickletools.opcodes:
        if op.name in unknown:
            with pytest.raises(errors.Unreadable, match="has the instruction 0x"):
                _pickle.load(b"\x80\x02(NN" + op.code.encode("latin-1") + b"1\n1\n.")


MALFORMED = {
    "empty": (b"", "in the middle"),
    "cut": (pickle.dumps({"a": [1, 2]})[:-1], "in the middle"),
    "no value": (b"\x80\x02.", "where there is none"),
    "no mark": (b"\x80\x02Nt.", "where there is none"),
    "too few": (b"\x80\x02N\x87.", "where there is none"),
    "protocol": (b"\x80\x06N.", "protocol 6"),
    "no list": (b"\x80\x02NNa.", "appends to what is no list"),
    "tuple": (b"\x80\x02)Na.", "appends to what is no list"),
    "no dict": (b"\x80\x02]NNs.", "assigns a key to what is no dict"),
    "odd": (b"\x80\x02}(NNNu.", "assigns a key to what is no dict"),
    "no arguments": (b"\x80\x02cos\nsystem\nNR.", "calls with what are no arguments"),
    "no memo": (b"\x80\x02h\x07.", "takes value 7, which it has not made"),
    "no name": (b"\x80\x04NN\x93.", "names a class by what is no text"),
    "endless name": (b"\x80\x02c" + b"a" * 5_000, "without an end"),
    "no text": (b"\x80\x02X\x01\x00\x00\x00\xff.", "which is no UTF-8"),
    "long number": (b"\x80\x02\x8b\xff\xff\xff\xff" + b"\xff" * 9, "a number of 4,294,967,295 bytes"),
    "text beyond": (b"\x80\x02X\xff\xff\xff\x7fab.", "in the middle"),
    "bytes beyond": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "in the middle"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles_are_refused(case):
    content, said = MALFORMED[case]
    with pytest.raises(errors.Unreadable, match=said) as caught:
        _pickle.load(content)
    assert str(caught.value).isprintable()


# --- memory


def text(size, mark=b"X"):
    return mark + struct.pack("<I", size) + ("\U0001f600" + "a" * (size - 4)).encode()


TREES = {
    "numbers": b"M\xff\xff",
    "floats": b"G" + bytes(8),
    "large numbers": b"\x8a\x28" + b"\x7f" * 40,
    "texts": text(40),
    "long texts": text(3_999),
    "skipped texts": b"B" + struct.pack("<I", 5) + b"abcde",
    "lists": b"]",
    "lists of one": b"]Na",
    "dicts": b"}",
    "dicts of one": b"}K\x01Ns",
    "marks": b"(",
    "tuples": b"N\x85",
    "long tuples": b"(" + b"N" * 30 + b"t",
    "nothing": b"N",
    "the same": b"]2222222222",
    "classes": b"cabc\ndef\n",
    "calls": b"N)R",
    "calls with all": b"N)RK\x01aK\x01K\x02sK\x03b",
    "references": b"NQ",
}


@pytest.mark.parametrize("name", TREES)
def test_values_are_priced_at_no_less_than_they_take(name):
    """The prices are upper bounds, by Python's own measure; beyond the budget a pickle is refused."""
    budget = MB
    data = b"\x80\x02(" + TREES[name] * min(40_000, 8 * MB // len(TREES[name])) + b"t."

    def refused():
        with pytest.raises(errors.Unreadable, match="far more memory"):
            _pickle.load(data, memory=budget)

    assert peak(refused) < budget + 30_000


@pytest.mark.parametrize("where", ["list", "dict", "memo"])
def test_what_grows_is_priced_too(where):
    grown = {
        "list": b"](" + b"N" * 30_000 + b"e(" + b"N" * 30_000 + b"e",
        "dict": b"}(" + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(30_000)) + b"u",
        "memo": b"N" + b"".join(b"r" + struct.pack("<I", n * 7919) for n in range(30_000)),
    }
    data = b"\x80\x02" + grown[where] + b"."
    machine = _pickle._Machine(data, 0, len(data), 100 * MB)
    taken = peak(machine.run)
    assert taken < 100 * MB - machine._left + 30_000


def test_a_memo_has_room_for_what_it_holds_and_not_for_the_index():
    data = b"\x80\x02Nr" + struct.pack("<I", 2**22) + b"."
    assert peak(lambda: _pickle.load(data)) < 30_000
    assert peak(lambda: pickle.loads(data)) > 2**22  # the control


def doubled(inside, times):
    """A list that holds a list twice, which holds a list twice."""
    steps = (b"q" + bytes([n]) + b"]h" + bytes([n]) + b"ah" + bytes([n]) + b"a" for n in range(times))
    return pickle.dumps(inside, 2)[:-1] + b"".join(steps) + b"."


def test_what_shares_its_parts_is_walked_once(monkeypatch):
    assert _tensors.find(_pickle.load(doubled([1], 60)).value) == {}
    found = _tensors.find(_pickle.load(doubled(np.ones(1), 3)).value)
    assert len(found) == 8 and len(set(map(id, found.values()))) == 8
    monkeypatch.setattr(_limits, "MAX_LEAVES", 1_000)
    with pytest.raises(errors.Unreadable, match="more than 1,000 leaves"):
        _tensors.find(_pickle.load(doubled(np.ones(1), 60)).value)
    monkeypatch.setattr(_tensors, "_MAX_VALUES", 1_000)
    with pytest.raises(errors.Unreadable, match="far more values"):
        _tensors.find(list(range(2_000)))


def test_endless_nesting_is_refused():
    unwrapped = b"\x80\x02" + b"ctorch._utils\n_rebuild_parameter\n" * 3_000 + b"N" + b"\x85R" * 3_000 + b"."
    with pytest.raises(errors.Unreadable, match="nested too deep"):
        _tensors.find(_pickle.load(unwrapped).value)
    assert _tensors.find(_pickle.load(b"\x80\x02]q\x00h\x00a.").value) == {}  # one that holds itself


# --- time and depth


def number(value):
    content = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def text_of(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def test_keys_that_share_a_hash_are_left_out():
    """Python hashes whole numbers by a prime: a dict of its multiples took an hour for a file of six megabytes."""
    prime = sys.hash_info.modulus
    keys = [prime * k for k in range(1, 5)]
    assert len(set(map(hash, keys))) == 1
    data = b"\x80\x02}(" + b"".join(number(key) + b"N" for key in [*keys, 7, -7]) + b"u."
    assert _pickle.load(data).value == {7: None, -7: None}


def nested(innermost, around, times):
    """A value inside of which a value stands ``times`` deep, each more than once: ``around(memo index)``."""
    steps = (b"r" + struct.pack("<I", n) + b"0" + around(b"j" + struct.pack("<I", n)) for n in range(times))
    return b"\x80\x02" + innermost + b"".join(steps) + b"."


STORAGE = b"(" + text_of("storage") + b"ctorch\nFloatStorage\n" + text_of("0") + text_of("cpu") + b"K\x04tQ"
VIEW = STORAGE + b"K\x00K\x04\x85K\x01\x85"  # storage, offset, shape, strides
SHARING = {
    "scales of scales": lambda get: (
        b"ctorch._utils\n_rebuild_qtensor\n(" + VIEW + b"(ctorch\nper_channel_affine\n" + get + get + b"K\x00ttR"
    ),
    "torchao of torchao": lambda get: (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cm\nf\nN)}("
        + b"".join(text_of(key) + get for key in ("qdata", "scale", "zero_point"))
        + b"utR"
    ),
}


@pytest.mark.parametrize("name", SHARING)
def test_a_quantised_tensor_whose_scales_are_one_is_looked_at_once(name):
    value = _pickle.load(nested(b"]", SHARING[name], 40)).value
    found = counted(20_000, lambda: _tensors.find(value))
    assert all(isinstance(leaf, _limits.Foreign) for leaf in found.values())


def modules(state, number=1):
    """Objects of one state."""
    return b"\x80\x02" + state + b"r\x00\x00\x00\x000](" + b"cm\nC\n)Rj\x00\x00\x00\x00b" * number + b"e."


MODULE = text_of("_parameters") + b"}" + text_of("_modules") + b"}"


def test_the_state_of_a_class_with_slots_is_not_copied():
    """Each of the objects that shared one state copied it."""
    size, number = 20_000, 3
    state = b"}(" + MODULE + b"".join(text_of(f"k{k}") + b"N" for k in range(size)) + b"u}\x86"
    value = _pickle.load(modules(state, number)).value
    assert peak(lambda: list(_tensors._Walk().tensors(value, "", "/"))) < 20 * size
    slots = {"a": np.ones(3, np.float32)}
    plain = _pickle.load(pickle.dumps(slots, 4)).value
    assert _tensors.find([_pickle.Object("m.C", (), (None, plain))]).keys() == {"0/a"}
    assert _tensors.find([_pickle.Object("m.C", (), (plain, {}))]).keys() == {"0/a"}


def test_a_module_leaves_few_buffers_out():
    left_out = b"](" + b"".join(text_of(f"k{k}") for k in range(2_000)) + b"e"
    state = b"}(" + MODULE + text_of("_non_persistent_buffers_set") + left_out + b"u"
    with pytest.raises(errors.Unreadable, match="leaves 2,000 buffers out"):
        _tensors.find(_pickle.load(modules(state)).value)


def test_what_holds_no_tensor_is_not_unwrapped_again():
    wrapped = b"ctorch._utils\n_rebuild_parameter\n" * 50 + b"N" + b"\x85R" * 50
    value = _pickle.load(b"\x80\x02" + wrapped + b"r\x00\x00\x00\x000](" + b"j\x00\x00\x00\x00" * 500 + b"e.").value
    assert counted(20_000, lambda: _tensors.find(value)) == {}


def test_the_shape_of_an_array_has_few_axes():
    """The strides of 10,000 long axes were multiplied out."""
    shape = b"(" + number(2**70) * 10_000 + b"t"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + shape + b"cnumpy\ndtype\n" + text_of("f4") + b"\x85R\x89"
    )
    value = _pickle.load(b"\x80\x02" + array + b"B\x00\x00\x00\x00tb.").value

    def refused():
        with pytest.raises(errors.Unreadable, match="has the shape"):
            _tensors.find(value)

    counted(2_000, refused)
