"""A network of PyTorch as its owner exports it to ONNX, for images of 224 pixels."""
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import torch

from experiments.formats.conversion import EXPORTED, arguments
from experiments.formats.conversion.by_torch import OPSET
from experiments.formats.conversion.torch_networks import network


def main() -> None:
    name, weights, folder = arguments()
    module = network(name)
    module.load_state_dict(torch.load(weights, weights_only=True))
    images = torch.zeros(1, 3, 224, 224)
    path = folder / EXPORTED
    torch.onnx.export(module.eval(), (images,), path, dynamo=False, opset_version=OPSET, input_names=["images"])


if __name__ == "__main__":
    main()
