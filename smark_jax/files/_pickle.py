"""Reads pickles without running anything in them: what they would call becomes an inert :class:`Object`.

A pickle is a program for a stack machine. Ours has the instructions that make values and no other: no module is
imported, no class looked up and no function called, whatever the pickle names. It is not :class:`pickle.Unpickler`,
whose memo grows to any index that a file names. Every value is priced before it is made, so that memory has a bound.

References:
  Python's ``pickletools``, for the instructions of protocols 2 to 5.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from smark_jax.errors import Unreadable
from smark_jax.files._limits import shown

MAX_MEMORY = 96 * 2**20
"""The most memory of a pickle's Python objects: a tensor of a state dict takes about 2 kB."""

# Upper bounds in bytes: a number or the fixed part of a text, a container, an object, an entry, a character.
_SMALL, _NODE, _OBJECT, _SLOT, _ENTRY, _CHAR = 64, 104, 176, 20, 160, 4
_MAX_TEXT = 4_000  # bytes; longer texts are skipped, and stay where they are in the file
_MAX_GLOBAL = 1_000
_MAX_NUMBER = 64
_LARGEST_KEY = 2**60
_ADVICE = "The file is damaged or forged: ask for it again, as safetensors."
_PROTOCOLS = range(2, 6)


@dataclass(frozen=True, slots=True)
class Global:
    """Stands for a class or a function, which is never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes, or a text too long to be a name, which stay where they are: from ``start`` to ``end``."""

    start: int
    end: int
    text: bool


@dataclass(slots=True, eq=False, repr=False)  # a representation would show all that is inside
class Object:
    """What a call would have made.

    Attributes:
      name: of what would have been called: module and name, joined by a dot; empty where the pickle computes it.
      arguments: of the call.
      state: what would have been set on the result.
      items: what would have been appended to it.
      entries: what would have been assigned to its keys, where a key is a text or a number.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] | None = None
    entries: dict[Any, Any] | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Persistent:
    """What the pickle refers to outside itself, such as a tensor's storage."""

    reference: Any


def matches(data: bytes) -> bool:
    """Whether the content begins like a pickle of protocol 2 or later; earlier ones have no mark."""
    return len(data) > 2 and data[0] == 0x80 and data[1] in _PROTOCOLS


class Pickle(NamedTuple):
    """A pickle that was read.

    Attributes:
      value: what it makes.
      end: where it ends.
      references: all in it to what lies outside of it.
    """

    value: Any
    end: int
    references: list[Persistent]


def load(data: bytes, start: int = 0, end: int | None = None, memory: int = MAX_MEMORY) -> Pickle:
    """Reads the pickle that begins at ``start`` and ends before ``end``, if given.

    Numbers, texts, lists, tuples and dicts are Python's own; sets are lists. All else is a :class:`Global`, a
    :class:`Blob`, an :class:`Object` or a :class:`Persistent`. A value may contain itself.

    Raises:
      Unreadable: when it is no pickle, or its value takes more than ``memory`` bytes.
    """
    machine = _Machine(data, start, len(data) if end is None else end, memory)
    try:
        return Pickle(machine.run(), machine.position, machine.references)
    except (IndexError, struct.error):
        raise Unreadable("its pickle takes a value where there is none", _ADVICE) from None


class _Machine:
    def __init__(self, data: bytes, start: int, end: int, memory: int) -> None:
        self._data, self.position, self._end, self._left = data, start, end, memory
        self.references: list[Persistent] = []
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self._data[self.skip(1)]) != _STOP:
            if code not in _STEPS:
                raise Unreadable(f"its pickle has the instruction {code:#04x}, which no weights need", _ADVICE)
            _STEPS[code](self)
        return self._stack.pop()

    def spend(self, size: int) -> None:
        """Refuses a pickle whose values would take more memory than is allowed."""
        self._left -= size
        if self._left < 0:
            raise Unreadable("its pickle takes far more memory than the description of a network", _ADVICE)

    def skip(self, length: int) -> int:
        """Moves the position past the next bytes, and returns where they begin."""
        start, self.position = self.position, self.position + length
        if self.position > self._end:
            raise Unreadable("its pickle ends in the middle of a value", _ADVICE)
        return start

    def taken(self, length: int) -> bytes:
        """The next bytes."""
        start = self.skip(length)
        return self._data[start : self.position]

    def number(self, length: int) -> int:
        """The next bytes as a number without sign."""
        start = self.skip(length)
        return self._data[start] if length == 1 else int.from_bytes(self._data[start : self.position], "little")

    def push(self, value: Any, price: int = _SMALL) -> None:
        self.spend(price + _SLOT)
        self._stack.append(value)

    def line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + _MAX_GLOBAL)
        if end < 0:
            raise Unreadable("its pickle names a class without an end", _ADVICE)
        text = self.taken(end - self.position)
        self.skip(1)
        return _decoded(text)

    def protocol(self) -> None:
        number = self.number(1)
        if number not in _PROTOCOLS:
            raise Unreadable(f"it is a pickle of protocol {number}, which is not known", _ADVICE)

    def mark(self) -> None:
        self.spend(_NODE + _SLOT)
        self._marked.append(self._stack)
        self._stack = []

    def to_mark(self) -> list[Any]:
        """The values since the last mark, which are taken off the stack."""
        values, self._stack = self._stack, self._marked.pop()
        return values

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.to_mark()

    def whole(self, length: int) -> None:
        """A whole number of so many bytes, with sign."""
        if length > _MAX_NUMBER:
            raise Unreadable(f"its pickle has a number of {length:,} bytes", _ADVICE)
        self.push(int.from_bytes(self.taken(length), "little", signed=True), _SMALL + length)

    def text(self, length: int, encoding: str = "utf-8") -> None:
        if length > _MAX_TEXT:
            self.blob(length, text=encoding == "utf-8")
        else:
            self.spend(_CHAR * length)
            self.push(_decoded(self.taken(length), encoding))

    def blob(self, length: int, text: bool = False) -> None:
        start = self.skip(length)
        self.push(Blob(start, self.position, text), _OBJECT)

    def collect(self, kind: Callable[[list[Any]], Any]) -> None:
        values = self.to_mark()
        self.push(kind(values), _NODE + _SLOT * len(values))

    def join(self, number: int) -> None:
        """A tuple of the last few values."""
        if number > len(self._stack):
            raise IndexError
        first = len(self._stack) - number
        values = tuple(self._stack[first:])
        del self._stack[first:]
        self.push(values, _NODE + _SLOT * number)

    def dictionary(self) -> None:
        values = self.to_mark()
        self.push({}, _NODE)
        self.assign(values)

    def extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        self.spend(_SLOT * len(values))
        if isinstance(target, Object):
            target.items = [] if target.items is None else target.items
            target = target.items
        if not isinstance(target, list):
            raise Unreadable("its pickle appends to what is no list", _ADVICE)
        target.extend(values)

    def append(self) -> None:
        value = self._stack.pop()
        self.extend([value])

    def assign(self, values: list[Any]) -> None:
        """Assigns to keys. What stands under any other key than a text or a usual number is no weight."""
        target = self._stack[-1]
        if isinstance(target, Object):
            self.spend(_NODE if target.entries is None else 0)
            target.entries = {} if target.entries is None else target.entries
            target = target.entries
        if not isinstance(target, dict) or len(values) % 2:
            raise Unreadable("its pickle assigns a key to what is no dict", _ADVICE)
        self.spend(_ENTRY * (len(values) // 2))
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Larger whole numbers can share one hash, and a dict of such keys takes time quadratic in their number.
            if isinstance(key, str | float) or (isinstance(key, int) and abs(key) < _LARGEST_KEY):
                target[key] = value

    def assign_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.assign([key, value])

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Unreadable("its pickle names a class by what is no text", _ADVICE)
        self.push(Global(f"{module}.{name}"), _NODE + _CHAR * (len(module) + len(name)))

    def name_on_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.name(module, name)

    def call(self, named: bool = False) -> None:
        """An inert object in place of a call's result."""
        named_arguments = self._stack.pop() if named else None
        arguments, callee = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise Unreadable("its pickle calls with what are no arguments", _ADVICE)
        made = Object(callee.name if isinstance(callee, Global) else "", arguments)
        made.entries = named_arguments if isinstance(named_arguments, dict) else None
        self.push(made, _OBJECT)

    def build(self) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Object):
            self._stack[-1].state = state

    def persistent(self) -> None:
        """A reference; one to a class, which PyTorch before 1.6 wrote with its source, is the class."""
        match self._stack.pop():
            case ("module", Global() as found, *_):
                self.push(found)
            case reference:
                self.references.append(Persistent(reference))
                self.push(self.references[-1], _NODE + _SLOT)

    def put(self, index: int) -> None:
        self.spend(_ENTRY)
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise Unreadable(f"its pickle takes value {index:,}, which it has not made", _ADVICE)
        self.push(self._memo[index], 0)

    def memoize(self) -> None:
        self.put(len(self._memo))


def _decoded(text: bytes, encoding: str = "utf-8") -> str:
    try:
        return text.decode(encoding)
    except UnicodeDecodeError:
        raise Unreadable(f"its pickle holds the text {shown(text)}, which is no UTF-8", _ADVICE) from None


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.protocol,
    0x95: lambda machine: machine.skip(8),  # the length of a frame
    ord("("): _Machine.mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.to_mark,
    ord("2"): lambda machine: machine.push(machine._stack[-1], 0),
    **{
        code: lambda machine, value=value: machine.push(value, 0)
        for code, value in ((ord("N"), None), (0x88, True), (0x89, False), (ord(")"), ()))
    },
    ord("J"): lambda machine: machine.whole(4),
    ord("K"): lambda machine: machine.push(machine.number(1), 0),
    ord("M"): lambda machine: machine.push(machine.number(2)),
    0x8A: lambda machine: machine.whole(machine.number(1)),
    0x8B: lambda machine: machine.whole(machine.number(4)),
    ord("G"): lambda machine: machine.push(struct.unpack(">d", machine.taken(8))[0]),
    **{
        code: lambda machine, size=size: machine.text(machine.number(size))
        for code, size in ((0x8C, 1), (ord("X"), 4), (0x8D, 8))
    },
    ord("U"): lambda machine: machine.text(machine.number(1), "latin-1"),  # strings of Python 2
    ord("T"): lambda machine: machine.text(machine.number(4), "latin-1"),
    **{
        code: lambda machine, size=size: machine.blob(machine.number(size))
        for code, size in ((ord("C"), 1), (ord("B"), 4), (0x8E, 8), (0x96, 8))
    },
    **dict.fromkeys((ord("]"), 0x8F), lambda machine: machine.push([], _NODE)),
    ord("a"): _Machine.append,
    **dict.fromkeys((ord("e"), 0x90), lambda machine: machine.extend(machine.to_mark())),
    **dict.fromkeys((ord("l"), 0x91), lambda machine: machine.collect(list)),
    ord("t"): lambda machine: machine.collect(tuple),
    **{0x84 + number: lambda machine, number=number: machine.join(number) for number in (1, 2, 3)},
    ord("}"): lambda machine: machine.push({}, _NODE),
    ord("d"): _Machine.dictionary,
    ord("s"): _Machine.assign_one,
    ord("u"): lambda machine: machine.assign(machine.to_mark()),
    ord("c"): lambda machine: machine.name(machine.line(), machine.line()),
    0x93: _Machine.name_on_stack,
    **dict.fromkeys((ord("R"), 0x81), _Machine.call),
    0x92: lambda machine: machine.call(named=True),
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
    ord("q"): lambda machine: machine.put(machine.number(1)),
    ord("r"): lambda machine: machine.put(machine.number(4)),
    0x94: _Machine.memoize,
    ord("h"): lambda machine: machine.get(machine.number(1)),
    ord("j"): lambda machine: machine.get(machine.number(4)),
}
