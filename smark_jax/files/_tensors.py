"""Finds the arrays in what a pickle describes: of state dicts, whole PyTorch models, TorchScript, NumPy and JAX.

A pickle names the function that would rebuild a tensor, and its arguments. We know what these functions would make, and
describe it as a :class:`Tensor`; whatever is not known is searched for tensors, and otherwise without meaning.

References:
  ``torch/_utils.py``, ``torch/_tensor.py`` and ``torch/jit/_pickle.py``; ``numpy.ndarray.__reduce__``.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._pickle import Blob, Global, Object

_MAX_DEPTH = 64
_MAX_VALUES = 100 * _limits.MAX_LEAVES
_MAX_PATH = 1_000
_MAX_LEFT_OUT = 1_000
_MAX_AXES = 32
_ADVICE = "Ask for its state dict alone, as safetensors."
CAST = "Weights are real arrays: leave it out, or save it as float32."

_DTYPES = {f"torch.{dtype.name}": dtype for dtype in _limits.DTYPES.values()}
# As NumPy writes a dtype without its byte order; bfloat16 and float8 stand as classes of ml_dtypes.
_ARRAYS = {dtype.str[1:]: dtype for dtype in _limits.DTYPES.values() if dtype.kind in "biuf"} | {
    f"ml_dtypes.{dtype.name}": dtype for dtype in _limits.DTYPES.values() if dtype.kind == "V"
}
_RECONSTRUCT = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")


class Tensor(NamedTuple):
    """A tensor, as a view of numbers that lie elsewhere.

    Attributes:
      storage: where the numbers are, as the pickle says it.
      dtype: of the numbers, in the byte order of the file; None for that of the storage.
      offset: of the first, counted in numbers.
      shape: of the tensor.
      strides: counted in numbers.
    """

    storage: Any
    dtype: np.dtype | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Scaled(NamedTuple):
    """A quantised tensor: ``(numbers - zero) * scale``.

    Attributes:
      numbers: whole numbers, or narrow floating-point numbers.
      scale: one number, or a tensor that has one for each index of ``axis``, or for each block of ``numbers``.
      zero: likewise.
      axis: the axis to which ``scale`` and ``zero`` belong; None where they have the axes of ``numbers``.
    """

    numbers: Tensor
    scale: Tensor | float
    zero: Tensor | float
    axis: int | None


Found = Tensor | Scaled | Foreign


def find(tree: Any, root: str = "") -> dict[str, Found]:
    """All tensors by name: the path to them, its steps joined by dots inside a module, and elsewhere by ``/``.

    The modules of a whole model have the names of its state dict. What optimisers keep is no weight, and left out.

    Raises:
      Unreadable: when names or nesting are beyond the limits, or a tensor is malformed.
    """
    leaves: dict[str, Found] = {}
    try:
        for name, found in _Walk().tensors(tree, root, "/"):
            _limits.check_name(name)
            if name in leaves:
                raise Unreadable(f"the leaf {shown(name)} occurs twice", _ADVICE)
            leaves[name] = found
            _limits.check_number(len(leaves))
    except RecursionError:
        raise Unreadable("it is nested too deep", _ADVICE) from None
    return leaves


class _Walk:
    """One pass over a pickle's value; what holds no tensor is looked at once, however often it occurs."""

    def __init__(self) -> None:
        self._above: list[int] = []  # the values around the one that is looked at, of which it may hold one again
        self._barren: set[int] = set()
        self._left = _MAX_VALUES

    def tensors(self, value: Any, path: str, joint: str) -> Generator[tuple[str, Found], None, bool]:
        """The tensors of a value by name; returns whether there are any."""
        if id(value) in self._above or id(value) in self._barren:
            return False
        name = path or "tensor"
        found = _tensor(value, name)
        if found is not None:
            yield name, found
            return True
        if len(self._above) > _MAX_DEPTH:
            raise Unreadable(f"it is nested more than {_MAX_DEPTH} deep", _ADVICE)
        self._above.append(id(value))
        inner, steps = _steps(value)
        fertile = False
        for step, part in steps:
            self._left -= 1
            if self._left < 0 or len(path) > _MAX_PATH:
                raise Unreadable("it has far more values, or longer names, than a network", _ADVICE)
            if isinstance(part, dict | list | tuple | Object):
                below = f"{path}{inner or joint}{step}" if path and step != "" else path or str(step)
                fertile |= yield from self.tensors(part, below, inner or joint)
        self._above.pop()
        if not fertile:
            self._barren.add(id(value))
        return fertile


def _steps(value: Any) -> tuple[str, Iterable[tuple[Any, Any]]]:
    """What joins the names of a value's parts, empty for what joins those around it, and the parts by name."""
    if isinstance(value, Object):
        state = value.state
        is_slotted = isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict)
        states: tuple[Any, ...] = state if is_slotted else (state,)  # two with slots: that of the dict, and the slots
        if isinstance(own := states[0], dict):
            if "_parameters" in own and "_modules" in own:
                return ".", _of_module(own)
            if value.name.startswith("__torch__."):
                return ".", own.items()
        parts = (value.entries or {}, value.items or (), value.arguments)
        if value.name == "collections.OrderedDict":  # its state is what PyTorch notes about versions
            return "/", [step for part in parts for step in _steps(part)[1]]
        return "/", [*(("", some) for some in states), *(step for part in parts for step in _steps(part)[1])]
    if isinstance(value, dict):
        return "/", () if {"state", "param_groups"} <= value.keys() else value.items()
    return "/", enumerate(value) if isinstance(value, list | tuple) else ()


def _of_module(state: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The parameters, buffers and modules in a module, but for buffers that a state dict leaves out."""
    left_out = state.get("_non_persistent_buffers_set")
    if isinstance(left_out, Object):  # before protocol 4 a set is a call
        left_out = next(iter(left_out.arguments), ())
    if isinstance(left_out, list) and len(left_out) > _MAX_LEFT_OUT:  # each buffer is looked for in it
        raise Unreadable(f"a module of it leaves {len(left_out):,} buffers out of its state dict", _ADVICE)
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, part in _entries(state.get(kind)).items():
            if kind != "_buffers" or not isinstance(left_out, list) or name not in left_out:
                yield name, part
    yield "_packed_params", state.get("_packed_params")  # of a quantised layer


def _entries(value: Any) -> dict[Any, Any]:
    entries = value.entries if isinstance(value, Object) else value
    return entries if isinstance(entries, dict) else {}


def _tensor(value: Any, path: str) -> Found | None:
    """The tensor that a value would be; None where it is none."""
    match value:
        case Object(name="torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", arguments=(*view,)):
            return _view(path, view[:4])
        case Object(name="torch._utils._rebuild_tensor_v3", arguments=(_, _, _, _, _, _, Global(dtype), *_) as view):
            return _view(path, view[:4], dtype)
        case Object(name="torch._utils._rebuild_qtensor", arguments=(_, _, _, _, quantizer, *_) as view):
            return _quantised(path, _view(path, view[:4]), quantizer)
        case Object(
            name="torch._utils._rebuild_parameter"
            | "torch._utils._rebuild_parameter_with_state"
            | "torch._utils._rebuild_device_tensor_from_cpu_tensor"
            | "torch._utils._rebuild_device_tensor_from_numpy"
            | "torch.jit._pickle.restore_type_tag",
            arguments=(first, *_),
        ):
            return _tensor(first, path)
        case Object(name="torch._tensor._rebuild_from_type_v2", arguments=(Global(name), _, tuple() as parts, state)):
            return _tensor(Object(name, parts), path) or _scaled(path, parts, state)
        case Object(name=name) if name in _RECONSTRUCT:
            return _array(path, value.state)
        case Object(name="jax._src.array._reconstruct_array", arguments=(_, _, state, *_)):
            return _array(path, state)
        case Object(name="numpy._core.numeric._frombuffer" | "numpy.core.numeric._frombuffer", arguments=arguments):
            return _array(path, (1, *arguments[2:3], *arguments[1:2], arguments[3:4] == ("F",), *arguments[:1]))
        case Object(name=name) if name.startswith("torch._utils._rebuild_") and "wrapper" not in name:
            what = name.removeprefix("torch._utils._rebuild_").replace("_", " ")
            return Foreign(f"leaf {shown(path)} is a {what}", CAST)
    return None


def _view(path: str, arguments: Sequence[Any], dtype: str = "") -> Tensor | Foreign:
    """A tensor of PyTorch's by the arguments that would rebuild it: storage, offset, shape and strides."""
    if dtype and dtype not in _DTYPES:
        return Foreign(f"leaf {shown(path)} is of dtype {shown(dtype)}", CAST)
    if len(arguments) != 4:
        raise Unreadable(f"leaf {shown(path)} is made of {len(arguments)} values", _ADVICE)
    storage, offset, shape, strides = arguments
    return _checked(path, Tensor(storage, _DTYPES.get(dtype), offset, _sizes(shape), _sizes(strides)))


def _sizes(value: Any) -> Any:
    """The lengths in a tuple, a list, or a ``torch.Size``."""
    match value:
        case Object(name="torch.Size", arguments=(sizes,)) | Object(items=list() as sizes) | sizes:
            return tuple(sizes[: _MAX_AXES + 1]) if isinstance(sizes, list | tuple) else sizes


def _checked(path: str, tensor: Tensor) -> Tensor:
    numbers = (tensor.shape, tensor.strides)
    if all(isinstance(sizes, tuple) for sizes in numbers) and len(tensor.shape) == len(tensor.strides) <= _MAX_AXES:
        if all(type(n) is int and 0 <= n < 2**48 for n in (tensor.offset, *tensor.shape, *tensor.strides)):
            return tensor
    raise Unreadable(
        f"leaf {shown(path)} has the shape {shown(tensor.shape)}, strides {shown(tensor.strides)}", _ADVICE
    )


def _array(path: str, state: Any) -> Tensor | Foreign:
    """An array of NumPy's by its state: version, shape, dtype, whether it is in Fortran's order, and its bytes."""
    match state:
        case (int(), tuple() as shape, Object(name="numpy.dtype", arguments=(kind, *_)) as described, bool(), content):
            order = described.state[1] if isinstance(described.state, tuple) and len(described.state) > 1 else "<"
            name = kind.name if isinstance(kind, Global) else kind
            dtype = _ARRAYS.get(name) if isinstance(name, str) else None
            if dtype is None or not isinstance(content, Blob | str | Object):
                return Foreign(f"leaf {shown(path)} is an array of dtype {shown(name)}", CAST)
            shape = shape[: _MAX_AXES + 1]
            axes = range(len(shape)) if state[3] else range(len(shape))[::-1]
            strides, step = [0] * len(shape), 1
            for axis in axes:
                strides[axis] = step
                step *= shape[axis] if type(shape[axis]) is int else -1
            tensor = Tensor(content, dtype.newbyteorder(">") if order == ">" else dtype, 0, shape, tuple(strides))
            return _checked(path, tensor)
    raise Unreadable(f"leaf {shown(path)} is no array as NumPy writes them", _ADVICE)


def _quantised(path: str, numbers: Tensor | Foreign, quantizer: Any) -> Found:
    """A quantised tensor of PyTorch's own; it has one scale, or one for each index of an axis."""
    if isinstance(numbers, Foreign):
        return numbers
    match quantizer:
        case (Global("torch.per_tensor_affine"), int() | float() as scale, int() as zero):
            return Scaled(numbers, scale, zero, None)
        case (Global(), scales, zeros, int() as axis) if 0 <= axis < len(numbers.shape):
            # One after another: both may hold such a tensor, which holds one twice.
            if isinstance(scale := _tensor(scales, path), Tensor) and isinstance(zero := _tensor(zeros, path), Tensor):
                return Scaled(numbers, scale, zero, axis)
    return Foreign(f"leaf {shown(path)} is quantised in a rare way", CAST)


def _scaled(path: str, arguments: tuple[Any, ...], state: Any) -> Found | None:
    """A quantised tensor of torchao; None for another subclass of tensors, which is searched."""
    if not isinstance(state, dict) or "scale" not in state:
        return None
    parts = []
    for key in ("qdata", "scale", "zero_point"):
        found = 0 if key == "zero_point" and state.get(key) is None else _tensor(state.get(key), path)
        if not isinstance(found, Tensor | int):  # at once: each may hold such a tensor, which holds one thrice
            break
        parts.append(found)
    else:
        numbers, scale, zero = parts
        if len(arguments) > 2 and numbers.shape == _sizes(arguments[2]):
            return Scaled(numbers, scale, zero, None)
    return Foreign(f"leaf {shown(path)} is quantised in a rare way", CAST)
