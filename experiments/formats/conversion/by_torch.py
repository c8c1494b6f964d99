"""A copy of a network of PyTorch as PyTorch saves it, and any module: states, programs, ONNX, TFLite."""
# pyright: reportMissingImports=false, reportMissingModuleSource=false

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.formats.conversion import REFERENCE, UNFOLDED, arguments, convert
from experiments.formats.conversion.torch_networks import SIZES, network

OPSET = 17


def makers(module: nn.Module, images: torch.Tensor) -> dict[str, Callable[[Path], None]]:
    """What saves a module in each form of PyTorch."""
    from safetensors.torch import save_file

    state = {name: leaf.detach().clone().contiguous() for name, leaf in module.state_dict().items()}

    def script(path: Path) -> None:
        torch.jit.save(torch.jit.trace(module, images), path)

    def export(path: Path) -> None:
        torch.export.save(torch.export.export(module, (images,)), path)

    def older(path: Path) -> None:
        torch.onnx.export(module, (images,), path, dynamo=False, opset_version=OPSET, input_names=["images"])

    def dynamo(path: Path) -> None:
        torch.onnx.export(module, (images,), path, dynamo=True, external_data=False, verbose=False)

    def litert(path: Path) -> None:
        import litert_torch

        litert_torch.convert(module, (images,)).export(str(path))

    return {
        "safetensors": lambda path: save_file(state, path),
        "state dict": lambda path: torch.save(state, path),
        "TorchScript": script,
        "torch.export": export,
        "ONNX, older exporter": older,
        "ONNX, dynamo": dynamo,
        "TFLite, LiteRT Torch": litert,
    }


def with_norms(module: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Saves ONNX whose batch norms are still there, for others to fold."""
    preserve = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        module, (images,), path, dynamo=False, opset_version=OPSET, training=preserve, input_names=["images"]
    )


def main() -> None:
    name, copy, folder = arguments()
    torch.manual_seed(0)
    module, size = network(name), SIZES[name]
    module.load_state_dict(torch.load(copy, weights_only=True))
    images = torch.rand(8, 3, size, size) * 2 - 1
    with torch.no_grad():
        logits = module(images).numpy()
    np.savez(folder / REFERENCE, images=images.permute(0, 2, 3, 1).numpy(), logits=logits)
    with_norms(module, images[:1], folder / UNFOLDED)
    convert("by_torch", makers(module, images[:1]), folder)


if __name__ == "__main__":
    main()
