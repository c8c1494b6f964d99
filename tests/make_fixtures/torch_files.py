"""Writes ``tests/data/torch``: small files of each form in which PyTorch keeps weights, and what PyTorch reads in them.

``python tests/make_fixtures/torch_files.py`` with PyTorch 2.13 and torchao 0.18; torchao's file is left out without it.
"""

import argparse
import pickle
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "data/torch"


class Net(nn.Module):
    """A convolution with its norm, a tied pair, and a buffer that a state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("left_out", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(torch.relu(self.body(x)).mean((2, 3))))


def values(leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as NumPy has them; dtypes that it lacks and quantised tensors as float32."""
    found = {}
    for name, leaf in leaves.items():
        whole = leaf.dequantize() if leaf.is_quantized or hasattr(leaf, "qdata") else leaf
        narrow = whole.is_floating_point() and whole.dtype not in (torch.float16, torch.float32, torch.float64)
        found[name] = (whole.float() if narrow else whole).detach().numpy()
    return found


def save_script(script: torch.jit.ScriptModule, path: Path) -> None:
    """Saves a TorchScript without its notes on which line of which file an instruction comes from."""
    script.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    # Whole models name their class: by a module that nobody can import.
    module = types.ModuleType("owner_code")
    module.Net = Net
    sys.modules["owner_code"] = module
    Net.__module__ = "owner_code"
    FOLDER.mkdir(exist_ok=True)
    # Legacy files of whole models hold the source of PyTorch's classes where it is found.
    vars(torch.serialization)["get_source_lines_and_file"] = lambda *_: ([f"# {'source ' * 1000}"], 1, "code.py")
    expected: dict[str, dict[str, np.ndarray]] = {}
    net = Net().eval()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = net.state_dict()

    matrix = torch.randn(6, 8)
    views = {
        "matrix": matrix, "turned": matrix.T, "piece": matrix[1:4, 2:7:2], "repeated": matrix[:1].expand(3, 8),
        "bf16": matrix.bfloat16(), "half": matrix.half(), "double": matrix.double(), "int": torch.arange(5),
        "bool": torch.tensor([True, False]), "byte": torch.arange(4, dtype=torch.uint8), "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5), "parameter": nn.Parameter(matrix[0]),
    }  # fmt: skip
    for end, zipped in (("", True), ("_legacy", False)):
        torch.save(state, FOLDER / f"state{end}.pt", _use_new_zipfile_serialization=zipped)
        torch.save(net, FOLDER / f"whole{end}.pt", _use_new_zipfile_serialization=zipped)
        torch.save(views, FOLDER / f"views{end}.pt", _use_new_zipfile_serialization=zipped)
        expected |= {f"state{end}.pt": values(state), f"whole{end}.pt": values(state), f"views{end}.pt": values(views)}

    training = {
        "epoch": 3, "state_dict": state, "optimizer": optimizer.state_dict(), "whole_optimizer": optimizer,
        "options": argparse.Namespace(rate=0.1), "best": np.float64(3),
    }  # fmt: skip
    torch.save(training, FOLDER / "training.pt")
    expected["training.pt"] = {f"state_dict/{name}": leaf for name, leaf in values(state).items()}

    save_script(torch.jit.script(net), FOLDER / "script.pt")
    expected["script.pt"] = values(state | {"left_out": torch.ones(2)})
    pair = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    save_script(torch.jit.freeze(torch.jit.script(pair)), FOLDER / "frozen.pt")
    constants = torch.jit.load(FOLDER / "frozen.pt").code_with_constants[1].const_mapping
    expected["frozen.pt"] = values({name.replace("c", "constants/"): leaf for name, leaf in constants.items()})

    quantised = {
        "tensor": torch.quantize_per_tensor(matrix, 0.03, 100, torch.quint8),
        "channel": torch.quantize_per_channel(matrix, torch.rand(8) / 50 + 0.01, torch.arange(8), 1, torch.qint8),
        "wide": torch.quantize_per_tensor(matrix.T, 1e-3, 0, torch.qint32),
    }
    torch.save(quantised, FOLDER / "quantised.pt")
    expected["quantised.pt"] = values(quantised)
    # Of a quantised layer the tensors are in an object of PyTorch's, and in no parameter.
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})
    torch.save(dynamic, FOLDER / "quantised_whole.pt")
    packed = {"0": dynamic[0].weight(), "1": dynamic[0].bias()}
    expected["quantised_whole.pt"] = values({f"0._packed_params._packed_params/0/{n}": x for n, x in packed.items()})
    narrow = {"e4m3": matrix.to(torch.float8_e4m3fn), "e5m2": matrix.to(torch.float8_e5m2)}
    torch.save(narrow, FOLDER / "float8.pt")
    expected["float8.pt"] = values(narrow)
    for protocol in (2, 5):
        (FOLDER / f"plain{protocol}.pkl").write_bytes(pickle.dumps(state, protocol))
        expected[f"plain{protocol}.pkl"] = values(state)
    try:
        import torchao.quantization as torchao
    except ImportError:
        print("torchao.pt is left as it is, and with it expected.npz")
        return
    for kind, config in (
        ("int8", torchao.Int8WeightOnlyConfig(version=2)),
        ("float8", torchao.Float8WeightOnlyConfig()),
    ):
        dense = nn.Sequential(nn.Linear(16, 4))
        torchao.quantize_(dense, config)
        torch.save(dense.state_dict(), FOLDER / f"torchao_{kind}.pt")
        expected[f"torchao_{kind}.pt"] = values(dense.state_dict())
    with open(FOLDER / "expected.npz", "wb") as file:
        named = {f"{path}:{name}": leaf for path, leaves in expected.items() for name, leaf in leaves.items()}
        np.savez_compressed(file, **{name.replace("/", "|"): leaf for name, leaf in named.items()})


if __name__ == "__main__":
    main()
