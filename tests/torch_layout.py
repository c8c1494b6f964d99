"""models.CNN as PyTorch keeps and computes it, without PyTorch: images NCHW, kernels OIHW, flattening CHW."""

import jax
import jax.numpy as jnp
import numpy as np


def cnn_leaves(params, side=28):
    """The state dict of a PyTorch network with the layers and the weights of a ``models.CNN`` for ``side`` pixels."""
    leaves = {}
    for layer, name in (("Conv_0", "conv1"), ("Conv_1", "conv2")):
        leaves[f"{name}.weight"] = np.ascontiguousarray(np.transpose(params[layer]["kernel"], (3, 2, 0, 1)))
    first = np.asarray(params["Dense_0"]["kernel"])
    height, features = side // 4, params["Conv_1"]["bias"].shape[0]
    rows = first.reshape(height, height, features, -1)
    leaves["fc1.weight"] = np.ascontiguousarray(np.transpose(rows, (3, 2, 0, 1)).reshape(first.shape[1], -1))
    leaves["fc2.weight"] = np.ascontiguousarray(np.asarray(params["Dense_1"]["kernel"]).T)
    for layer, name in (("Conv_0", "conv1"), ("Conv_1", "conv2"), ("Dense_0", "fc1"), ("Dense_1", "fc2")):
        leaves[f"{name}.bias"] = np.asarray(params[layer]["bias"])
    return leaves


def cnn_logits(leaves, images):
    """What that network answers to images [B 1 H W] of 0 to 1."""
    x = images
    for name in ("conv1", "conv2"):
        x = jax.lax.conv_general_dilated(
            x, leaves[f"{name}.weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x = jnp.maximum(x + leaves[f"{name}.bias"][None, :, None, None], 0)
        batch, channels, height, width = x.shape
        x = x[:, :, : height // 2 * 2, : width // 2 * 2].reshape(batch, channels, height // 2, 2, width // 2, 2)
        x = x.max((3, 5))
    x = jnp.maximum(x.reshape(len(x), -1) @ leaves["fc1.weight"].T + leaves["fc1.bias"][None], 0)
    return x @ leaves["fc2.weight"].T + leaves["fc2.bias"][None]
