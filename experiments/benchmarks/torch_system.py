"""The same system in PyTorch, with the dense projections of Uchida et al. 2017 and DeepMarks (Chen et al. 2019).

It is written to be fast: no unneeded gradients, in-place operations, channels last, codewords in blocks. It imports
neither JAX nor smark_jax. Its codewords come from PyTorch's generator, which anybody can predict, or from OpenSSL's
ChaCha20.
"""
# pyright: reportMissingImports=false

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STRENGTH = 0.03
ROWS_PER_BLOCK = 16_384  # codewords made at a time
Stream = Callable[[int, int, int], Tensor]
# The eight signs of each byte: looking them up unpacks bits several times faster than shifting.
_BYTE_SIGNS = 1 - 2 * ((torch.arange(256, device=DEVICE)[:, None] >> torch.arange(8, device=DEVICE)) & 1).float()


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def projection(num_chips: int, num_weights: int, seed: int) -> Tensor:
    """The secret matrix: normal entries of variance 1 / D, so that rows have a length of about 1; shape [m, D]."""
    matrix = torch.randn(num_chips, num_weights, generator=generator(seed), device=DEVICE)
    return matrix.mul_(num_weights**-0.5)


def generator_stream(num_words: int, num_chips: int, seed: int) -> Tensor:
    """Random bytes, as table indices, eight chips each, shape [K, ceil(m / 8)]: 64 bits a number is far the fastest."""
    numbers = torch.empty(num_words, -(-num_chips // 64), dtype=torch.int64, device=DEVICE)
    numbers.random_(-(2**63), None, generator=generator(seed))
    return numbers.view(torch.uint8)[:, : -(-num_chips // 8)].int()


def cipher_stream(num_words: int, num_chips: int, seed: int) -> Tensor:
    """Codewords as :func:`generator_stream` has them, from OpenSSL's ChaCha20 under a key: nobody can predict them."""
    key = seed.to_bytes(32, "little")
    num_bytes = -(-num_chips // 8)
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(num_words * num_bytes))
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8).view(num_words, num_bytes).to(DEVICE).int()


def signs(num_words: int, num_chips: int, seed: int, stream: Stream = generator_stream) -> Tensor:
    """Codewords of -1 and +1 from the bits of a stream, float32, shape [K, m]."""
    return F.embedding(stream(num_words, num_chips, seed), _BYTE_SIGNS).view(num_words, -1)[:, :num_chips]


def uchida_loss(weights: Tensor, matrix: Tensor, code: Tensor) -> Tensor:
    """Cross-entropy of the bits with the projection as logits (Uchida et al., arXiv 1701.04082)."""
    return F.binary_cross_entropy_with_logits(matrix @ weights, (code + 1) / 2)


def deepmarks_loss(weights: Tensor, matrix: Tensor, code: Tensor) -> Tensor:
    """Mean squared distance of the projection to the codeword (arXiv 1804.03648)."""
    return F.mse_loss(matrix @ weights, code)


def embedded(weights: Tensor, matrix: Tensor, code: Tensor, strength: float = STRENGTH) -> Tensor:
    """Spread spectrum: the rows added with the code's signs; each weight moves by strength times their common rms."""
    scale = strength * weights.square().mean().sqrt() * math.sqrt(matrix.shape[1] / matrix.shape[0])
    return torch.addmv(weights, matrix.T, code * scale)


def extracted(suspect: Tensor, base: Tensor, matrix: Tensor) -> Tensor:
    """The soft chips, shape [m]."""
    return matrix @ (suspect - base)


@torch.no_grad()
def statistics(chips: Tensor, num_customers: int, seed: int, rows: int = ROWS_PER_BLOCK) -> Tensor:
    """T of every customer, codewords made ``rows`` at a time, shape [N]."""
    direction = chips / chips.norm()
    found = torch.empty(num_customers, device=DEVICE)
    for block, start in enumerate(range(0, num_customers, rows)):
        count = min(rows, num_customers - start)
        torch.mv(signs(count, len(chips), seed + block), direction, out=found[start : start + count])
    return found


@torch.no_grad()
def statistics_by_tables(
    chips: Tensor,
    num_customers: int,
    seed: int,
    rows: int = ROWS_PER_BLOCK,
    stream: Stream = generator_stream,
) -> Tensor:
    """The same without unpacking: what each of the 256 values of each byte adds to T is in a table, shape [N]."""
    direction = F.pad(chips / chips.norm(), (0, -len(chips) % 8))
    tables = (direction.view(-1, 8) @ _BYTE_SIGNS.T).flatten()
    first = 256 * torch.arange(len(direction) // 8, dtype=torch.int32, device=DEVICE)
    found = torch.empty(num_customers, device=DEVICE)
    for block, start in enumerate(range(0, num_customers, rows)):
        count = min(rows, num_customers - start)
        index = stream(count, len(chips), seed + block).add_(first)
        torch.sum(tables[index], 1, out=found[start : start + count])
    return found


def log_p_values(statistics: Tensor) -> Tensor:
    r"""Natural logarithms of :math:`2 c N \bar\Phi(|T|)`, at most 0, with :math:`c = 1 / (4 \bar\Phi(\sqrt 2))`.

    Bentkus and Dzindzalieta (2015): a bound on weighted sums of signs, corrected for N customers. Shape [N].
    """
    constant = math.log(2 * len(statistics)) - math.log(4)
    constant -= float(torch.special.log_ndtr(torch.tensor(-math.sqrt(2), dtype=torch.float64)))
    return torch.special.log_ndtr(-statistics.abs().double()).add_(constant).clamp_(max=0)


class CNN(nn.Module):
    """smark_jax's CNN: two convolutions, two dense layers, 421,642 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_0 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv_1 = nn.Conv2d(32, 64, 3, padding=1)
        self.dense_0 = nn.Linear(3136, 128)
        self.dense_1 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv_0(images)), 2)
        x = F.max_pool2d(F.relu(self.conv_1(x)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # Flax's order; costs nothing with channels last
        return self.dense_1(F.relu(self.dense_0(x)))


def network(leaves: dict[str, np.ndarray]) -> CNN:
    """The CNN with weights as Flax names and lays them out."""
    state = {}
    for torch_name, name in (
        ("conv_0", "Conv_0"),
        ("conv_1", "Conv_1"),
        ("dense_0", "Dense_0"),
        ("dense_1", "Dense_1"),
    ):
        kernel = leaves[f"{name}/kernel"]
        order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        state[f"{torch_name}.weight"] = torch.tensor(kernel.transpose(order))
        state[f"{torch_name}.bias"] = torch.tensor(leaves[f"{name}/bias"])
    found = CNN()
    found.load_state_dict(state)
    return found.to(DEVICE).to(memory_format=torch.channels_last)


def pixels(images: np.ndarray) -> Tensor:
    """uint8 of [..., H, W, 1] as floats of [..., 1, H, W] in 0 to 1, channels last."""
    flat = torch.from_numpy(images.reshape(-1, *images.shape[-3:])).to(DEVICE).permute(0, 3, 1, 2)
    return flat.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: CNN, images: Tensor, labels: Tensor) -> float:
    right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return float(sum(right) / len(labels))
