"""Writes ``tests/data/small.gguf`` and what its tensors stand for, ``small_gguf.npz``, with the package ``gguf`` 0.19.

``python tests/make_fixtures/gguf_file.py``
"""

from pathlib import Path

import gguf
import numpy as np

DATA = Path(__file__).parents[1] / "data"


def main() -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(DATA / "small.gguf", "vit")
    writer.add_string("general.name", "a classifier")
    writer.add_array("labels", ["cat", "dog", "x" * 50])
    writer.add_array("sizes", [1, 2, 3])
    writer.add_float32("scale", 0.5)
    writer.add_bool("flag", True)
    kernel = rng.standard_normal((4, 64)).astype(np.float32)
    expected = {}
    leaves = {
        "f32": kernel.reshape(2, 2, 64),
        "f16": kernel.astype(np.float16),
        "f64": kernel.astype(np.float64),
        "bias": kernel[0],
        "i32": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    for name, leaf in leaves.items():
        writer.add_tensor(name, leaf)
        expected[name] = leaf
    for name in ("BF16", "Q8_0", "Q4_0", "Q4_1"):
        kind = gguf.GGMLQuantizationType[name]
        codes = gguf.quants.quantize(kernel, kind)
        writer.add_tensor(name, codes, raw_dtype=kind)
        expected[name] = gguf.quants.dequantize(codes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.savez_compressed(DATA / "small_gguf.npz", **expected)


if __name__ == "__main__":
    main()
