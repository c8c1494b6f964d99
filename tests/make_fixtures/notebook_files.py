"""Writes ``notebooks/data``: a small network of PyTorch for digits, in the forms that two notebooks start from.

``python tests/make_fixtures/notebook_files.py`` with PyTorch 2.13 and onnxscript 0.7.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch_files import save_script

from smark_jax import data

FOLDER = Path(__file__).parents[2] / "notebooks/data"
IMAGES = 100


class Digits(nn.Module):
    """Three convolutions with their norms, and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 24, 48, 64)
        self.body = nn.Sequential()
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            self.body.append(nn.Conv2d(inputs, outputs, 3, stride=1 + (layer < 2), padding=1, bias=False))
            self.body.append(nn.BatchNorm2d(outputs))
            self.body.append(nn.ReLU())
        self.hidden = nn.Linear(64, 128)
        self.out = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(self.body(x).mean((2, 3)))))


def pixels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    digits = data.load("mnist_5k", split)
    images = digits.images.astype(np.float32).transpose(0, 3, 1, 2) / 255
    return torch.tensor(images), torch.tensor(np.asarray(digits.labels, np.int64))


def trained(epochs: int = 12, size: int = 100) -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = pixels("train")
    net = Digits()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * len(images) // size)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    net = trained()
    images, labels = pixels("test")
    with torch.no_grad():
        logits = net(images)
    print(f"accuracy {(logits.argmax(1) == labels).float().mean():.3f}")
    some = images[:2].clone()  # of a view, torch.export would keep all that is behind it
    program = torch.export.export(net, (some,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, FOLDER / "digits.pt2")
    torch.onnx.export(program, (), FOLDER / "digits.onnx", dynamo=True, external_data=False, verbose=False)
    np.save(FOLDER / "digits_logits.npy", logits[:IMAGES].numpy())
    half = net.half()
    save_script(torch.jit.trace(half, some.half()), FOLDER / "digits_half_script.pt")


if __name__ == "__main__":
    main()
