"""The networks of PyTorch, with the names of the libraries that they come from."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

SIZES = {"EfficientNet-Lite0": 64, "O-Net": 48, "ViT": 32, "ConvNeXt": 64}
"""Height and width of the images that each network is run on; the weights fit others too, but for ViT's and O-Net's."""


class ONet(nn.Module):
    """The last network of MTCNN (Zhang et al. 2016) as facenet-pytorch has it; the result is all three heads'."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)
        self.pool, self.last_pool = nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.prelu1(self.conv1(x)))
        x = self.pool(self.prelu2(self.conv2(x)))
        x = self.last_pool(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu5(self.dense5(x))
        return torch.cat([self.dense6_1(x), self.dense6_2(x), self.dense6_3(x)], 1)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, 1e-6), _Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, 1e-6), _Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with timm's names: 1.8 million weights."""

    def __init__(self, dim: int = 192, depth: int = 4, heads: int = 3, patch: int = 8, classes: int = 100) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        tokens = (SIZES["ViT"] // patch) ** 2
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens + 1, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B C H W]."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw, self.norm, self.mlp = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim), nn.LayerNorm(dim, 1e-6), _Mlp(dim)
        self.gamma = nn.Parameter(0.5 + torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class _Stage(nn.Module):
    def __init__(self, before: int, dim: int, depth: int) -> None:
        super().__init__()
        halve = nn.Sequential(_ChannelNorm(before, 1e-6), nn.Conv2d(before, dim, 2, 2))
        self.downsample = nn.Identity() if before == dim else halve
        self.blocks = nn.Sequential(*(_ConvNeXtBlock(dim) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """A ConvNeXt (Liu et al. 2022) with timm's names: 1.7 million weights."""

    def __init__(self, dims: tuple[int, ...] = (40, 80, 160, 320), depths: tuple[int, ...] = (1, 1, 2, 1)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), _ChannelNorm(dims[0], 1e-6))
        befores = (dims[0], *dims[:-1])
        self.stages = nn.Sequential(*(_Stage(*sizes) for sizes in zip(befores, dims, depths, strict=True)))
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(dims[-1], 1e-6), "fc": nn.Linear(dims[-1], 100)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x)).mean((2, 3))
        return self.head["fc"](self.head["norm"](x))


def network(name: str) -> nn.Module:
    """A network with random weights."""
    if name == "EfficientNet-Lite0":
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

        return EfficientNet.from_name("efficientnet-lite0").eval()
    return {"O-Net": ONet, "ViT": ViT, "ConvNeXt": ConvNeXt}[name]().eval()


def main() -> None:
    """``python -m experiments.formats.conversion.torch_networks NETWORK SEED PATH`` saves random weights."""
    name, seed, path = sys.argv[1:]
    torch.manual_seed(int(seed))
    module = network(name)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):  # at its start a norm has the same gain in each channel
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.2)
    torch.save(module.state_dict(), Path(path))


if __name__ == "__main__":
    main()
