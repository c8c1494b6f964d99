"""Ten small models under the names of their frameworks, and a reader of safetensors that shares no code with ours."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from flax import nnx

Leaves = dict[str, np.ndarray]
BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
KINDS = {
    np.dtype(dtype): kind
    for dtype, kind in (
        *((f"f{n}", f"F{8 * n}") for n in (2, 4, 8)),
        *((f"i{n}", f"I{8 * n}") for n in (1, 2, 4, 8)),
        *((f"u{n}", f"U{8 * n}") for n in (1, 2, 4, 8)),
        ("?", "BOOL"),
        (BF16, "BF16"),
        (F8, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
    )
}


def write(path: Path, leaves: Leaves, notes: dict[str, str] | None = None) -> None:
    """A safetensors file with metadata, in the order of the dict, without padding of the header."""
    header, start = {"__metadata__": notes} if notes else {}, 0
    for name, leaf in leaves.items():
        header[name] = {"dtype": KINDS[leaf.dtype], "shape": leaf.shape, "data_offsets": (start, start + leaf.nbytes)}
        start += leaf.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(leaf.tobytes() for leaf in leaves.values()))


class Raw(NamedTuple):
    """A safetensors file: its header to the byte, and each leaf's bytes and dtype."""

    header: bytes
    leaves: dict[str, bytes]
    dtypes: dict[str, str]

    def floats(self, name: str) -> np.ndarray:
        dtype = next(dtype for dtype, kind in KINDS.items() if kind == self.dtypes[name])
        return np.frombuffer(self.leaves[name], dtype).astype(np.float64)


def read(path: Path) -> Raw:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    body = data[8 + length :]
    leaves = {name: body[slice(*entry["data_offsets"])] for name, entry in entries.items()}
    return Raw(data[: 8 + length], leaves, {name: entry["dtype"] for name, entry in entries.items()})


class Model(NamedTuple):
    """Leaves, those of them that may carry by a regular expression, and the metadata of their file."""

    leaves: Leaves
    carries: str
    notes: dict[str, str] | None = None


_RNG = np.random.default_rng(20)
_START = _RNG.bit_generator.state


def from_the_start() -> None:
    """Makes what is drawn next independent of which tests ran before."""
    _RNG.bit_generator.state = _START


def some(*shape: int, dtype: object = np.float32) -> np.ndarray:
    return _RNG.normal(0, 0.1, shape).astype(dtype)


def waves(length: int, turns: np.ndarray) -> np.ndarray:
    """A table of positions as sines and cosines."""
    angles = np.arange(length)[:, None] * turns
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def variance(*shape: int, dtype: object = np.float32) -> np.ndarray:
    """Of channels of which the first is quiet: a mark of 3 % of the root mean square turns it negative."""
    found = _RNG.gamma(1.0, 1.0, shape).astype(dtype)
    found.reshape(-1)[0] = 1e-7
    return found


def torch_batch_norm() -> Model:
    leaves = {
        "features.0.weight": some(32, 16, 3, 3),
        "features.1.weight": 1 + some(32),
        "features.1.bias": some(32),
        "features.1.running_mean": some(32),
        "features.1.running_var": variance(32),
        "features.1.num_batches_tracked": np.array(3_000_000_000),
        "head.weight": some(60, 32),
        "head.bias": some(60),
    }
    return Model(leaves, r"weight$|bias$", {"format": "pt", "note": "für Ada"})


def torch_ddp_halves() -> Model:
    names = ("module.conv.weight", "module.bn.weight", "module.bn.running_mean", "module.bn.running_var")
    shapes = ((32, 16, 3, 3), (32,), (32,), (32,))
    leaves = {name: some(*shape, dtype=np.float16) for name, shape in zip(names, shapes, strict=True)}
    leaves["module.bn.running_var"] = variance(32, dtype=np.float16)
    leaves |= {"module.bn.weight": 1 + leaves["module.bn.weight"], "module.step": np.array(2.0**24 + 2, np.float64)}
    return Model(leaves, r"conv\.weight|bn\.weight", {"format": "pt"})


def keras() -> Model:
    leaves = {
        "conv2d/kernel:0": some(3, 3, 16, 32),
        "batch_normalization/gamma:0": 1 + some(32),
        "batch_normalization/beta:0": some(32),
        "batch_normalization/moving_mean:0": some(32),
        "batch_normalization/moving_variance:0": variance(32),
        "iterations": np.array(2**40),
    }
    return Model(leaves, "kernel|gamma|beta")


def keras_numbered() -> Model:
    """Keras 3 numbers a layer's variables: which is the variance only content tells."""
    leaves = {
        "layers/conv2d/vars/0": some(3, 3, 16, 32),
        "layers/batch_normalization/vars/0": 1 + some(32),
        "layers/batch_normalization/vars/1": some(32),
        "layers/batch_normalization/vars/2": some(32),
        "layers/batch_normalization/vars/3": variance(32),
        "optimizer/vars/0": np.array(12_345.0, np.float32),
    }
    return Model(leaves, "conv2d")


def linen() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(200)(x))
            return nn.Dense(10)(nn.relu(x))

    variables = jax.tree.map(np.array, Net().init(jax.random.key(0), np.zeros((1, 24))))
    variables["batch_stats"]["BatchNorm_0"]["var"] = variance(200)
    return Model(flat(variables), "^params/.*(kernel|scale)$")


def nnx_state() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(24, 200, rngs=rngs)
            self.norm = nnx.BatchNorm(200, rngs=rngs)
            self.out = nnx.Linear(200, 12, rngs=rngs)

    state = nnx.to_pure_dict(nnx.split(Net(nnx.Rngs(0)))[1])
    state["norm"] |= {"var": variance(200), "mean": some(200)}
    return Model(flat(jax.tree.map(np.asarray, state)), "kernel$|scale$")


def haiku() -> Model:
    leaves = {
        "net/~/linear/w": some(48, 100),
        "net/~/linear/b": some(100),
        "net/~/batch_norm/~/mean_ema/average": some(1, 100),
        "net/~/batch_norm/~/mean_ema/hidden": some(1, 100),
        "net/~/batch_norm/~/mean_ema/counter": np.array(7, np.int32),
        "net/~/batch_norm/~/var_ema/average": variance(1, 100),
        "net/~/batch_norm/~/var_ema/hidden": variance(1, 100),
        "net/~/batch_norm/scale": 1 + some(1, 100),
    }
    return Model(leaves, "linear/[wb]$|batch_norm/scale$")


def doubles() -> Model:
    leaves = {
        "dense/kernel": some(60, 80, dtype=np.float64),
        "norm/mean": some(80, dtype=np.float64),
        "norm/variance": variance(80, dtype=np.float64),
        "norm/count": np.array([2**53 + 1]),
        "global_step": np.array(2.0**53 - 1),
        "mask": np.eye(8, dtype=np.float64),
        "seen": np.array([True, False, True]),
    }
    return Model(leaves, "kernel")


def tied_transformer() -> Model:
    embedding = some(120, 32, dtype=BF16)
    turns = 10_000.0 ** -(np.arange(0, 32, 2) / 32)
    leaves = {
        "transformer.wte.weight": embedding,
        "transformer.h.0.attn.weight": some(96, 32, dtype=BF16),
        "transformer.h.0.attn.mask": np.tril(np.ones((1, 1, 8, 8), np.float32)),
        "transformer.h.0.ln.weight": (1 + some(32)).astype(BF16),
        "transformer.position_ids": np.arange(40)[None],
        "transformer.rotary.inv_freq": turns.astype(np.float32),
        "transformer.table": waves(40, turns),
        "lm_head.weight": embedding.copy(),
    }
    return Model(leaves, "wte|lm_head|attn.weight|ln.weight", {"format": "pt"})


def quantised() -> Model:
    leaves = {
        "conv.weight": _RNG.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8),
        "conv.scale": np.array([0.02], np.float32),
        "conv.zero_point": np.array([3]),
        "linear.weight": some(16, 64).astype(F8),
        "linear.weight_scale": np.abs(some(16)),
        "head.weight": some(40, 64),
        "head.bias": some(40),
        "head.act.min_val": np.array(-1.25, np.float32),
        "bytes": np.arange(7, dtype=np.uint8),
    }
    return Model(leaves, r"linear\.weight$|head\.(weight|bias)$")


MODELS: dict[str, Callable[[], Model]] = {
    made.__name__: made
    for made in (
        *(torch_batch_norm, torch_ddp_halves, keras, keras_numbered, linen, nnx_state),
        *(haiku, doubles, tied_transformer, quantised),
    )
}


def flat(tree: object) -> Leaves:
    """The leaves by name, without our own function for it."""
    found: Leaves = {}

    def walk(value: object, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for step, part in value.items():
                walk(part, (*path, str(step)))
        else:
            found["/".join(path)] = np.asarray(value)

    walk(tree, ())
    return found
