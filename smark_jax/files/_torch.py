"""Reads PyTorch's zip files: a separate process unpickles them with ``weights_only`` and returns safetensors.

The process has the same rights as ours, but it has limits on memory, time and output, an almost empty environment, and
none of our data in its memory. Its output is read like any other hostile file.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _safetensors, _zip
from smark_jax.files._limits import Foreign
from smark_jax.files._places import Unwritable
from smark_jax.files._sources import Source

_SECONDS = 120
_CHILD = Path(__file__).with_name("_torch_child.py")
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
_CONVERT = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"


def matches(data: bytes) -> bool:
    """Whether the content is a zip that contains a pickle, as written by ``torch.save``.

    Raises:
      Unreadable: when it is a zip that is not safe to open.
    """
    return _zip.matches(data) and any(name.endswith("data.pkl") for name in _zip.opened(data).namelist())


def read(source: Source, max_bytes: int) -> Mapping[str, np.ndarray | Foreign]:
    """The tensors of a state dict, or of a dict with one in it, by name."""
    _zip.bounded(source.data, max_bytes)
    if importlib.util.find_spec("torch") is None:
        advice = f"Install smark-jax[torch], or convert it with {_CONVERT}."
        raise Unreadable("it is a PyTorch file, and PyTorch is not installed", advice)
    with tempfile.TemporaryDirectory() as folder:
        suspect, target = Path(folder, "suspect"), Path(folder, "leaves")
        suspect.write_bytes(source.data)
        command = [sys.executable, "-I", str(_CHILD), str(suspect), str(target), str(max_bytes), str(_SECONDS)]
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {"OMP_NUM_THREADS": "1"}
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                timeout=2 * _SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code == 0 and target.is_file():
            return _safetensors.read_file(target)
        reason = "a limit on memory, time or size was exceeded" if code else "it handed over nothing"
        if code == 2 and target.is_file():
            reason = target.read_text(encoding="ascii", errors="replace")[:200]
    raise Unreadable(f"PyTorch does not read it safely: {reason}", "Ask for its state dict alone, as safetensors.")


def places(source: Source) -> dict[str, Unwritable]:
    """No leaf has a place yet."""
    return dict.fromkeys(read(source, _limits.ANY_SIZE), Unwritable.PACKED)
