"""Runs as a script, separately from smark_jax: ``_torch_child.py SOURCE TARGET MAX_BYTES SECONDS``.

Writes the tensors of SOURCE to TARGET as safetensors and exits with 0, or writes the reason why not and exits with 2.
"""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

_MAX_DEPTH, _MAX_TENSORS = 16, 100_000
_SPARE = 256 * 2**20


class _Refused(Exception):
    """A reason that may be shown."""


def main(source: str, target: str, max_bytes: int, seconds: int) -> int:
    """Reads one file; returns the exit code."""
    try:
        torch: Any = importlib.import_module("torch")
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
            raise _Refused(f"PyTorch {torch.__version__} is too old for this: 2.10 or newer is needed")
        from safetensors.torch import save_file

        _limit(max_bytes, seconds)
        loaded = torch.load(source, map_location="cpu", weights_only=True)
        save_file(_plain(torch, loaded, max_bytes), target)
    except Exception as error:
        # Not PyTorch's own message, which recommends loading without weights_only.
        reason = str(error) if isinstance(error, _Refused) else "it is damaged, or holds more than tensors"
        with open(target, "w", encoding="ascii", errors="backslashreplace") as file:
            file.write(reason)
        return 2
    return 0


def _limit(max_bytes: int, seconds: int) -> None:
    """Limits memory to what PyTorch already uses plus the tensors, and limits time and output. Not on Windows."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[5]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    memory, output = taken + max_bytes + _SPARE, max_bytes + 2**24
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _tensors(torch: Any, value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """The tensors of nested dicts and lists by path."""
    if depth > _MAX_DEPTH:
        raise _Refused(f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, torch.Tensor):
        yield path or "tensor", value
    elif isinstance(value, dict | list | tuple):
        for step, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(torch, part, f"{path}/{step}" if path else str(step), depth + 1)


def _plain(torch: Any, loaded: Any, max_bytes: int) -> dict[str, Any]:
    """Checks that the tensors are plain and small, and gives each its own memory."""
    found: dict[str, Any] = {}
    memory: set[int] = set()
    for path, tensor in _tensors(torch, loaded, "", 0):
        max_bytes -= tensor.numel() * tensor.element_size()
        odd = tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex()
        if max_bytes < 0 or path in found or len(found) == _MAX_TENSORS:
            raise _Refused(f"tensor {path[:40]!r} is too large, one too many or has the name of another")
        if odd:  # passed on as a complex tensor, which the reader will leave out by name, or refuse
            found[path] = torch.zeros(1, dtype=torch.complex64)
            continue
        whole = tensor.detach().contiguous()
        found[path] = whole.clone() if whole.untyped_storage().data_ptr() in memory else whole
        memory.add(whole.untyped_storage().data_ptr())
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
