"""The same system in PyTorch, with the dense projections of Uchida et al. 2017 and DeepMarks (Chen et al. 2019).

It is written to be fast: no gradient where none is needed, memory used in place, channels last, codewords in blocks.
It neither imports JAX nor smark_jax. Its codewords come from PyTorch's generator, which is no cipher: that makes it
faster than what it is compared with, not slower.
"""
# pyright: reportMissingImports=false

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Arms = Mapping[str, Callable[[], dict[str, Any] | None]]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Codewords that are unpacked at a time, and copies that are made at a time.
_ROWS_A_BLOCK = 16_384
_COPIES_A_BATCH = 32
_STRENGTH = 0.03
# Fine-tuning: the factor on Uchida's loss and Adam's rate, for a layer and for all weights. Of factors 0.1, 1 and 10
# and rates 0.001 and 0.003 these took the least time among those that left the accuracy about where it was.
_LAYER, _ALL, _BATCH = (10.0, 1e-3), (1.0, 3e-3), 64
# The eight signs of each byte: looking them up unpacks bits several times as fast as shifting them.
_BYTE_SIGNS = 1 - 2 * ((torch.arange(256, device=DEVICE)[:, None] >> torch.arange(8, device=DEVICE)) & 1).float()


def device() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def device_peak() -> float | None:
    """Peak megabytes on an accelerator; None on a CPU, whose memory is the process's."""
    return torch.cuda.max_memory_allocated() / 1e6 if DEVICE.type == "cuda" else None


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _done(function: Callable[[], Any]) -> Callable[[], None]:
    def arm() -> None:
        function()
        _wait()

    return arm


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def projection(num_chips: int, num_weights: int, seed: int) -> Tensor:
    """The secret matrix: normal entries of variance 1 / D, so that rows have length 1; shape [m, D]."""
    matrix = torch.randn(num_chips, num_weights, generator=_generator(seed), device=DEVICE)
    return matrix.mul_(num_weights**-0.5)


def _stream(num_words: int, num_chips: int, seed: int) -> Tensor:
    """Random bytes, as table indices, eight chips each, shape [K, ceil(m / 8)]: 64 bits a number is far the fastest."""
    numbers = torch.empty(num_words, -(-num_chips // 64), dtype=torch.int64, device=DEVICE)
    numbers.random_(-(2**63), None, generator=_generator(seed))
    return numbers.view(torch.uint8)[:, : -(-num_chips // 8)].int()


def signs(num_words: int, num_chips: int, seed: int) -> Tensor:
    """Codewords of -1 and +1 from the bits of a seeded generator, float32, shape [K, m]."""
    return F.embedding(_stream(num_words, num_chips, seed), _BYTE_SIGNS).view(num_words, -1)[:, :num_chips]


def uchida_loss(weights: Tensor, matrix: Tensor, code: Tensor) -> Tensor:
    """Cross-entropy of the bits with the projection as logits (arXiv 1701.04082, equation 3)."""
    return F.binary_cross_entropy_with_logits(matrix @ weights, (code + 1) / 2)


def deepmarks_loss(weights: Tensor, matrix: Tensor, code: Tensor) -> Tensor:
    """Mean squared distance of the projection to the codeword (arXiv 1804.03648)."""
    return F.mse_loss(matrix @ weights, code)


def embedded(weights: Tensor, matrix: Tensor, code: Tensor, strength: float = _STRENGTH) -> Tensor:
    """Spread spectrum: the rows added with the code's signs; each weight moves by strength times their common rms."""
    scale = strength * weights.square().mean().sqrt() * math.sqrt(matrix.shape[1] / matrix.shape[0])
    return torch.addmv(weights, matrix.T, code * scale)


def extracted(suspect: Tensor, base: Tensor, matrix: Tensor) -> Tensor:
    """The soft chips, shape [m]."""
    return matrix @ (suspect - base)


def weights(num_weights: int, num_chips: int, seed: int) -> Arms:
    """Work on one vector of weights with a dense projection, and one copy of it."""
    base = torch.randn(num_weights, generator=_generator(seed), device=DEVICE)
    matrix = projection(num_chips, num_weights, seed + 1)
    code = signs(1, num_chips, seed + 2)[0]
    marked = embedded(base, matrix, code)
    moved, chips = torch.empty_like(base), torch.empty(num_chips, device=DEVICE)

    def extract() -> dict[str, Any]:
        return {"wrong_chips": int((extracted(marked, base, matrix).sign() != code).sum())}

    return {
        "copy": _done(lambda: torch.add(base, 1, out=moved)),
        "spread": _done(lambda: torch.mv(matrix.T, code, out=moved)),
        "despread": _done(lambda: torch.mv(matrix, base, out=chips)),
        "embed": _done(lambda: embedded(base, matrix, code)),
        "extract": extract,
    }


def fingerprint_losses(num_weights: int, num_chips: int, seed: int) -> Arms:
    """Value and gradient of the two losses with a dense projection."""
    vector = torch.randn(num_weights, generator=_generator(seed), device=DEVICE).requires_grad_()
    matrix, code = projection(num_chips, num_weights, seed + 1), signs(1, num_chips, seed + 2)[0]

    def arm(loss: Callable[..., Tensor]) -> Callable[[], None]:
        return _done(lambda: torch.autograd.grad(loss(vector, matrix, code), vector))

    return {"uchida": arm(uchida_loss), "deepmarks": arm(deepmarks_loss)}


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
        x = x.permute(0, 2, 3, 1).flatten(1)  # in the order of Flax; free with channels last
        return self.dense_1(F.relu(self.dense_0(x)))


def _images(pixels: np.ndarray) -> Tensor:
    """uint8 of [..., H, W, 1] as floats of [..., 1, H, W] in 0 to 1, channels last."""
    flat = torch.from_numpy(pixels.reshape(-1, *pixels.shape[-3:])).to(DEVICE).permute(0, 3, 1, 2)
    return flat.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


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


def train(parties: int, batch: int, seed: int) -> Arms:
    """A data-parallel step of the CNN: the mean of the parties' gradients, then Adam.

    On one device the parties' batches may run one after the other (``parties``), or as one (``joined``): the mean of
    equally many examples' gradients is the same.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = _images(rng.integers(0, 256, (parties, batch, 28, 28, 1), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, parties * batch)).to(DEVICE)

    def arm(parts: int) -> Callable[[], None]:
        model = CNN().to(DEVICE).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def step() -> None:
            optimizer.zero_grad()
            for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                (F.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()

        return _done(step)

    return {"parties": arm(parties), "joined": arm(1)}


def copies(num_copies: int, num_weights: int, num_chips: int, seed: int) -> Arms:
    """Copies by spread spectrum, some at a time: one product of codewords and projection for each batch."""
    base = torch.randn(num_weights, generator=_generator(seed), device=DEVICE)
    matrix = projection(num_chips, num_weights, seed + 1)
    words = signs(num_copies, num_chips, seed + 2)
    scale = float(_STRENGTH * base.square().mean().sqrt() * math.sqrt(num_weights / num_chips))
    made = torch.empty(min(num_copies, _COPIES_A_BATCH), num_weights, device=DEVICE)

    def embed() -> None:
        for some in words.split(_COPIES_A_BATCH):
            torch.addmm(base, some, matrix, alpha=scale, out=made[: len(some)])

    return {"embed": _done(embed)}


@torch.no_grad()
def _accuracy(model: CNN, images: Tensor, labels: Tensor) -> float:
    right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return float(sum(right) / len(labels))


def tune(model: str, num_chips: int, seed: int) -> Arms:
    """A copy by fine-tuning with Uchida's loss beside the task's until every bit reads right, a new codeword each lap.

    ``layer`` marks the mean kernel of the first dense layer, as the paper does with a convolution (no convolution of
    this network has as many entries as there are bits); ``all`` marks every weight. The projection's entries are
    standard normal, as in the paper.
    """
    with np.load(model) as saved:
        leaves = {name.removeprefix("weights:"): saved[name] for name in saved.files if name.startswith("weights:")}
        images, labels = _images(saved["train_images"]), torch.from_numpy(saved["train_labels"]).long().to(DEVICE)
        test_images, test_labels = _images(saved["test_images"]), torch.from_numpy(saved["test_labels"]).to(DEVICE)
    rng = torch.Generator().manual_seed(seed)

    def arm(read: Callable[[CNN], Tensor], factor: float, learning_rate: float) -> Callable[[], dict[str, Any]]:
        width = read(network(leaves)).numel()
        matrix = torch.randn(num_chips, width, generator=_generator(seed), device=DEVICE)
        codes = iter(range(seed, 1 << 30))

        def copy() -> dict[str, Any]:
            code = signs(1, num_chips, next(codes))[0]
            copy = network(leaves)
            optimizer = torch.optim.Adam(copy.parameters(), learning_rate)
            steps, order = 0, torch.randperm(len(images), generator=rng).split(_BATCH)
            while True:
                some = order[steps % len(order)].to(DEVICE)
                chips = matrix @ read(copy)
                if bool((chips.detach() * code > 0).all()):
                    break
                steps += 1
                if steps > 5000:
                    raise RuntimeError(f"tune: {num_chips} bits still not right after {steps} steps.")
                task = F.cross_entropy(copy(images[some]), labels[some])
                loss = task + factor * F.binary_cross_entropy_with_logits(chips, (code + 1) / 2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            _wait()
            return {"steps": steps, "model": copy}

        def timed() -> dict[str, Any]:
            began = time.perf_counter()
            found = copy()
            seconds = time.perf_counter() - began
            accuracy = _accuracy(found["model"], test_images, test_labels)
            return {"seconds": seconds, "steps": found["steps"], "accuracy": accuracy}

        return timed

    mean_kernel = lambda net: net.dense_0.weight.mean(0)  # noqa: E731
    every_weight = lambda net: torch.cat([weight.flatten() for weight in net.parameters()])  # noqa: E731
    return {"layer": arm(mean_kernel, *_LAYER), "all": arm(every_weight, *_ALL)}


@torch.no_grad()
def statistics(chips: Tensor, num_customers: int, seed: int, rows: int = _ROWS_A_BLOCK) -> Tensor:
    """T of every customer, codewords made ``rows`` at a time, shape [N]."""
    direction = chips / chips.norm()
    found = torch.empty(num_customers, device=DEVICE)
    for block, start in enumerate(range(0, num_customers, rows)):
        count = min(rows, num_customers - start)
        torch.mv(signs(count, len(chips), seed + block), direction, out=found[start : start + count])
    return found


@torch.no_grad()
def statistics_by_tables(chips: Tensor, num_customers: int, seed: int, rows: int = _ROWS_A_BLOCK) -> Tensor:
    """The same without unpacking: what each of the 256 values of each byte adds to T is in a table, shape [N]."""
    direction = F.pad(chips / chips.norm(), (0, -len(chips) % 8))
    tables = (direction.view(-1, 8) @ _BYTE_SIGNS.T).flatten()
    first = 256 * torch.arange(len(direction) // 8, dtype=torch.int32, device=DEVICE)
    found = torch.empty(num_customers, device=DEVICE)
    for block, start in enumerate(range(0, num_customers, rows)):
        count = min(rows, num_customers - start)
        index = _stream(count, len(chips), seed + block).add_(first)
        torch.sum(tables[index], 1, out=found[start : start + count])
    return found


def log_p_values(statistics: Tensor) -> Tensor:
    r"""Natural logarithms of :math:`2 c N \bar\Phi(|T|)`, at most 0, with :math:`c = 1 / (4 \bar\Phi(\sqrt 2))`.

    Bentkus and Dzindzalieta (2015): a bound on weighted sums of signs, corrected for N customers. Shape [N].
    """
    constant = math.log(2 * len(statistics)) - math.log(4)
    constant -= float(torch.special.log_ndtr(torch.tensor(-math.sqrt(2), dtype=torch.float64)))
    return torch.special.log_ndtr(-statistics.abs().double()).add_(constant).clamp_(max=0)


def verdict(num_customers: int, num_chips: int, seed: int) -> Arms:
    """From the generator's seed to every customer's p-value.

    Codewords in blocks and a product with each; all of them at once (``held``); or in blocks, by ``tables``.
    """
    guilty = min(num_customers, _ROWS_A_BLOCK) // 3

    def arm(score: Callable[..., Tensor], rows: int) -> Callable[[], dict[str, Any]]:
        @functools.cache  # made by the first lap, so that an arm which does not run takes no memory
        def chips() -> Tensor:
            word = signs(min(rows, num_customers), num_chips, seed)[guilty]
            return word + torch.randn(num_chips, generator=_generator(seed), device=DEVICE)

        def run() -> dict[str, Any]:
            log_p = log_p_values(score(chips(), num_customers, seed, rows))
            return {"right": torch.nonzero(log_p <= math.log(1e-6)).flatten().tolist() == [guilty]}

        return run

    return {
        "blocks": arm(statistics, _ROWS_A_BLOCK),
        "tables": arm(statistics_by_tables, _ROWS_A_BLOCK),
        "held": arm(statistics, num_customers),
    }


CASES: dict[str, Callable[..., Arms]] = {
    "weights": weights,
    "losses": fingerprint_losses,
    "train": train,
    "copies": copies,
    "tune": tune,
    "verdict": verdict,
}
