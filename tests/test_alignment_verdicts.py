"""No rewritten copy may be called "no copy": where alignment does not follow a network, its verdict says so.

Each network below has a rewrite that keeps its function, made by hand in float64 NumPy. The network itself says that
the logits stay. Alignment must then find a copy, or answer that the case is undecided and why.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_alignment_groups import Weights, conv, drawn, head, network, norm, relu, softmax

from smark_jax import alignment, attacks, errors

TOKENS, IMAGES = (3, 6, 8), (2, 6, 6, 4)
Leaves = dict[str, np.ndarray]
Compute = Callable[[Weights, jax.Array], jax.Array]


@pytest.fixture(autouse=True)
def _ranks_promoted():
    with jax.numpy_rank_promotion("allow"):
        yield


class Case(NamedTuple):
    """A network, a rewrite of its weights, and the network that takes these, where constants moved with channels."""

    compute: Compute
    rewrite: Callable[[Leaves, np.random.Generator], Leaves]
    shape: tuple[int, ...] = TOKENS
    moved: Compute | None = None


def mixing(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Invertible matrices."""
    return np.linalg.qr(rng.normal(size=shape))[0] * np.exp(rng.normal(size=shape[-1]))


def order(rng: np.random.Generator, size: int) -> np.ndarray:
    """An order without a place that stays."""
    return np.roll(np.arange(size), 1 + int(rng.integers(size - 1)))


def with_(leaves: Leaves, **changed: np.ndarray) -> Leaves:
    return {**leaves, **changed}


# Attention, head by head.


def one_head(q: jax.Array, k: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    return softmax((x @ q) @ (x @ k).swapaxes(1, 2)) @ (x @ v)


def over_heads(p: Weights, x: jax.Array) -> jax.Array:
    made = jax.vmap(one_head, (0, 0, 0, None))(p("q", 4, 8, 4), p("k", 4, 8, 4), p("v", 4, 8, 4), x)
    return jnp.einsum("hnte,hec->nc", made, p("out", 4, 4, 5))


def by_slices(p: Weights, x: jax.Array) -> jax.Array:
    q, k, v = (p(name, 8, 16) for name in "qkv")
    parts = [slice(4 * i, 4 * i + 4) for i in range(4)]
    made = jnp.concatenate([one_head(q[:, s], k[:, s], v[:, s], x) for s in parts], -1)
    return made.mean(1) @ p("out", 16, 5)


def heads_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    """Other bases of queries and keys, and of values, and another order of heads; kernels of [H, D, d]."""
    a, b, heads = mixing(rng, 4, 4, 4), mixing(rng, 4, 4, 4), order(rng, 4)
    moved = {
        "q": leaves["q"] @ a,
        "k": leaves["k"] @ np.linalg.inv(a).swapaxes(1, 2),
        "v": leaves["v"] @ b,
        "out": np.linalg.inv(b) @ leaves["out"],
    }
    return {name: leaf[heads] for name, leaf in moved.items()}


def slices_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    split = {name: leaves[name].reshape(8, 4, 4).swapaxes(0, 1) for name in "qkv"}
    moved = heads_changed({**split, "out": leaves["out"].reshape(4, 4, 5)}, rng)
    return {name: moved[name].swapaxes(0, 1).reshape(8, 16) for name in "qkv"} | {"out": moved["out"].reshape(16, 5)}


# Channels.


def crelu(p: Weights, x: jax.Array) -> jax.Array:
    x = x @ p("a", 8, 12)
    return jnp.concatenate([relu(x), relu(-x)], -1).mean(1) @ p("head", 24, 5)


def crelu_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at, signs = rng.permutation(12), np.where(np.arange(12) % 2, 1, -1)
    up, down = leaves["head"][:12], leaves["head"][12:]
    up, down = (np.where(signs[:, None] > 0, a, b) for a, b in ((up, down), (down, up)))
    return {"a": (leaves["a"] * signs)[:, at], "head": np.concatenate([up[at], down[at]])}


def gram(p: Weights, x: jax.Array) -> jax.Array:
    made = x @ p("a", 8, 6)
    return (made @ made.swapaxes(1, 2)).reshape(x.shape[0], -1)


def gram_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return {"a": leaves["a"] @ np.linalg.qr(rng.normal(size=(6, 6)))[0]}


def padded_shortcut(p: Weights, x: jax.Array) -> jax.Array:
    x = relu(conv(p, x, "stem", 8))
    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4))) + conv(p, x, "a", 16)[:, ::2, ::2]
    return relu(x).mean((1, 2)) @ p("head", 16, 5)


def padded_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    inner, outer = order(rng, 8), order(rng, 8)
    every = np.r_[np.arange(4), np.arange(12, 16)][outer]
    whole = np.r_[every[:4], 4 + inner, every[4:]]
    stem, a = leaves["stem"][..., inner], leaves["a"][:, :, inner][..., whole]
    return {"stem": stem, "a": a, "head": leaves["head"][whole]}


def gain_used_twice(p: Weights, x: jax.Array) -> jax.Array:
    gain = p("gain", 6) * lax.rsqrt(p("gain of variance", 6) + 1e-3)
    made = x @ p("a", 8, 6)
    return (made * gain).mean(1) @ p("head", 6, 5) + (made * gain * gain)[:, 0] @ p("b", 6, 5)


def gain_used_twice_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    gain = leaves["gain"] / np.sqrt(leaves["gain of variance"] + 1e-3)
    a = mixing(rng, 6, 6)
    return {
        "gain": np.sqrt(1 + 1e-3) * np.ones(6),
        "gain of variance": np.ones(6),
        "a": leaves["a"] @ a,
        "head": np.linalg.inv(a) @ (gain[:, None] * leaves["head"]),
        "b": np.linalg.inv(a) @ (np.square(gain)[:, None] * leaves["b"]),
    }


def fused_batch_norm(p: Weights, x: jax.Array) -> jax.Array:
    gain = p("gain", 6) * lax.rsqrt(p("gain of variance", 6) + 1e-3)
    x = (x @ p("a", 8, 6)) * gain + (p("shift", 6) - p("mean", 6) * gain)
    return x.mean(1) @ p("head", 6, 5)


def fused_batch_norm_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    gain = leaves["gain"] / np.sqrt(leaves["gain of variance"] + 1e-3)
    a = mixing(rng, 6, 6)
    shift = leaves["shift"] - leaves["mean"] * gain
    return {
        "gain": np.sqrt(1 + 1e-3) * np.ones(6),
        "gain of variance": np.ones(6),
        "mean": np.zeros(6),
        "shift": shift @ a,
        "a": (leaves["a"] * gain) @ a,
        "head": np.linalg.inv(a) @ leaves["head"],
    }


MASK = np.exp(0.7 * np.random.default_rng(7).normal(size=12)).astype(np.float32)
AT = np.roll(np.arange(12), 5)


def masked(values: np.ndarray, added: bool) -> Compute:
    def compute(p: Weights, x: jax.Array) -> jax.Array:
        x = x @ p("a", 8, 12)
        return relu(x + values if added else x * values).mean(1) @ p("head", 12, 5)

    return compute


def moved_with_the_mask(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return {"a": leaves["a"][:, AT], "head": leaves["head"][AT]}


def taken_by_place(p: Weights, x: jax.Array) -> jax.Array:
    w = p("a", 8, 6)
    return jnp.asarray(sum(relu((x @ w)[..., i]).mean(1)[:, None] * p("head", 6, 5)[i] for i in range(6)))


def taken_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at = order(rng, 6)
    return {"a": leaves["a"][:, at], "head": leaves["head"][at]}


def shuffled_weights(p: Weights, x: jax.Array) -> jax.Array:
    places = jnp.asarray(np.random.default_rng(1).permutation(12))
    return relu(x @ p("a", 8, 12)[:, places]).mean(1) @ p("head", 12, 5)


def shuffled_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    places = np.random.default_rng(1).permutation(12)
    at = order(rng, 12)
    a = np.empty((8, 12))
    a[:, places] = leaves["a"][:, places][:, at]
    return {"a": a, "head": leaves["head"][at]}


def strongest(p: Weights, x: jax.Array) -> jax.Array:
    return relu(x @ p("a", 8, 24)).max(-1)


def strongest_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return {"a": leaves["a"][:, order(rng, 24)]}


# Layers.


def scanned(p: Weights, x: jax.Array) -> jax.Array:
    up, down = p("up", 3, 8, 16), p("down", 3, 16, 8)
    x = lax.scan(lambda x, w: (x + relu(x @ w[0]) @ w[1], None), x @ p("stem", 8, 8), (up, down))[0]
    return head(p, x)


def looped(p: Weights, x: jax.Array) -> jax.Array:
    up, down = jnp.asarray(p("up", 3, 8, 16)), jnp.asarray(p("down", 3, 16, 8))
    x = lax.fori_loop(0, 3, lambda i, x: x + relu(x @ up[i]) @ down[i], x @ p("stem", 8, 8))
    return head(p, x)


def stacked(p: Weights, x: jax.Array) -> jax.Array:
    up, down, x = p("up", 3, 8, 16), p("down", 3, 16, 8), x @ p("stem", 8, 8)
    for i in range(3):
        x = x + relu(x @ up[i]) @ down[i]
    return head(p, x)


def layers_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    a, at = mixing(rng, 8, 8), rng.permutation(16)
    b = np.linalg.inv(a)
    return with_(
        leaves,
        stem=leaves["stem"] @ a,
        up=(b @ leaves["up"])[..., at],
        down=leaves["down"][:, at] @ a,
        head=b @ leaves["head"],
    )


# Branches.


def expert(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return relu(x @ up) @ down


def experts(p: Weights, x: jax.Array) -> jax.Array:
    weights = softmax(x @ p("router", 8, 4))
    made = relu(jnp.einsum("ntd,edf->ntef", x, p("up", 4, 8, 6)))
    return jnp.einsum("nte,ntef,efc->nc", weights, made, p("down", 4, 6, 5))


def experts_listed(p: Weights, x: jax.Array) -> jax.Array:
    weights, up, down = softmax(x @ p("router", 8, 4)), p("up", 4, 8, 6), p("down", 4, 6, 5)
    return jnp.asarray(sum((weights[..., i, None] * expert(x, up[i], down[i])).mean(1) for i in range(4)))


def experts_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at, inner, shift = order(rng, 4), np.stack([rng.permutation(6) for _ in range(4)]), 9 * rng.normal(size=(8, 1))
    up = np.stack([leaves["up"][e][:, i] for e, i in zip(at, inner, strict=True)])
    down = np.stack([leaves["down"][e][i] for e, i in zip(at, inner, strict=True)])
    return {"router": leaves["router"][:, at] + shift, "up": up, "down": down}


def towers(p: Weights, x: jax.Array) -> jax.Array:
    one, other = (expert(x, p(f"up {i}", 8, 12), p(f"down {i}", 12, 5)).mean(1) for i in (1, 2))
    return (one + other) / 2


def towers_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return {name: leaves[name[:-1] + {"1": "2", "2": "1"}[name[-1]]] for name in leaves}


def towers_stacked(p: Weights, x: jax.Array) -> jax.Array:
    return jnp.stack([expert(x, p(f"up {i}", 8, 12), p(f"down {i}", 12, 5)).mean(1) for i in (1, 2)]).mean(0)


def maxout(p: Weights, x: jax.Array) -> jax.Array:
    return jnp.maximum(x @ p("up 1", 8, 12), x @ p("up 2", 8, 12)).mean(1) @ p("down", 12, 5)


def maxout_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return {"up 1": leaves["up 2"], "up 2": leaves["up 1"], "down": leaves["down"]}


# Weights that are computed before they are used.


def standardised(p: Weights, x: jax.Array) -> jax.Array:
    kernel = lambda w: (w - w.mean(0)) / jnp.sqrt(w.var(0) + 1e-6)  # noqa: E731
    return relu(x @ kernel(p("a", 8, 12))).mean(1) @ kernel(p("head", 12, 5))


def standardised_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at = rng.permutation(12)
    a, last = leaves["a"][:, at], leaves["head"][at]
    return {"a": a + 9 * rng.normal(size=(1, 12)), "head": last + 9 * rng.normal(size=(1, 5))}


def binary(p: Weights, x: jax.Array) -> jax.Array:
    return relu(x @ jnp.square(p("a", 8, 12))).mean(1) @ jnp.square(p("head", 12, 5))


def binary_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return {name: leaf * np.where(rng.random(leaf.shape) < 0.5, 1, -1) for name, leaf in leaves.items()}


def summed_kernels(p: Weights, x: jax.Array) -> jax.Array:
    kernel = lambda name, n, m: p(name + " 1", n, m) + p(name + " 2", n, m)  # noqa: E731
    return relu(x @ kernel("a", 8, 12)).mean(1) @ kernel("head", 12, 5)


def summed_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    shift = {name[:-2]: 9 * rng.normal(size=leaf.shape) for name, leaf in leaves.items()}
    return {name: leaf + (shift[name[:-2]] if name[-1] == "1" else -shift[name[:-2]]) for name, leaf in leaves.items()}


# Norms, gates, attention in other spellings.


def normed_hidden(p: Weights, x: jax.Array) -> jax.Array:
    """Layer norms straight behind kernels, and relu behind them."""
    x = relu(norm(p, x @ p("a", 8, 12), "1"))
    return norm(p, x.mean(1) @ p("head", 12, 5), "2")


def normed_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at = rng.permutation(12)
    a, last = leaves["a"][:, at] + 9 * rng.normal(size=(8, 1)), leaves["head"][at] + 9 * rng.normal(size=(12, 1))
    return with_(leaves, a=a, head=last, **{f"{name} 1": leaves[f"{name} 1"][at] for name in ("gain", "shift")})


def linear_attention(p: Weights, x: jax.Array) -> jax.Array:
    q, k, v = (x @ p(name, 8, 6) for name in "qkv")
    return (q @ (k.swapaxes(1, 2) @ v)).mean(1) @ p("out", 6, 5)


def linear_attention_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    a, b = mixing(rng, 6, 6), mixing(rng, 6, 6)
    return {
        "q": leaves["q"] @ a,
        "k": leaves["k"] @ np.linalg.inv(a).T,
        "v": leaves["v"] @ b,
        "out": np.linalg.inv(b) @ leaves["out"],
    }


def talking_heads(p: Weights, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("ntd,dhe->nhte", x, p(name, 8, 4, 4)) for name in "qkv")
    scores = softmax(jnp.einsum("nhqk,hg->ngqk", jnp.einsum("nhqe,nhke->nhqk", q, k), p("before", 4, 4)))
    scores = jnp.einsum("nhqk,hg->ngqk", scores, p("after", 4, 4))
    return jnp.einsum("nhqk,nhke,hec->nc", scores, v, p("out", 4, 4, 5))


def talking_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    a, b = mixing(rng, 4, 4, 4), mixing(rng, 4, 4, 4)
    one, two, three = (order(rng, 4) for _ in range(3))
    by_head = {name: leaves[name].swapaxes(0, 1) for name in "qkv"}
    moved = {
        "q": (by_head["q"] @ a)[one],
        "k": (by_head["k"] @ np.linalg.inv(a).swapaxes(1, 2))[one],
        "v": (by_head["v"] @ b)[three],
    }
    return {name: leaf.swapaxes(0, 1) for name, leaf in moved.items()} | {
        "before": leaves["before"][one][:, two],
        "after": leaves["after"][two][:, three],
        "out": (np.linalg.inv(b) @ leaves["out"])[three],
    }


def grouped_queries(p: Weights, x: jax.Array) -> jax.Array:
    """Two heads of keys and values for four of queries."""
    q, k, v = (jnp.einsum("ntd,dhe->nthe", x, p(name, 8, n, 4)) for name, n in (("q", 4), ("k", 2), ("v", 2)))
    k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
    made = jnp.einsum("nhqk,nkhe->nqhe", softmax(jnp.einsum("nqhe,nkhe->nhqk", q, k)), v)
    return jnp.einsum("nqhe,hec->nc", made, p("out", 4, 4, 5))


def grouped_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    a, b = mixing(rng, 2, 4, 4), mixing(rng, 2, 4, 4)
    by_head = {name: leaves[name].swapaxes(0, 1) for name in "qkv"}
    inverse = np.linalg.inv(a).swapaxes(1, 2)
    moved = {"q": by_head["q"] @ np.repeat(a, 2, 0), "k": by_head["k"] @ inverse, "v": by_head["v"] @ b}
    out, heads, pairs = np.repeat(np.linalg.inv(b), 2, 0) @ leaves["out"], np.array([3, 2, 1, 0]), np.array([1, 0])
    moved = {"q": moved["q"][heads], "k": moved["k"][pairs], "v": moved["v"][pairs]}
    return {name: leaf.swapaxes(0, 1) for name, leaf in moved.items()} | {"out": out[heads]}


def swiglu(p: Weights, x: jax.Array) -> jax.Array:
    one, other = jnp.split(x @ p("up", 8, 24), 2, -1)
    return (jax.nn.silu(one) * other).mean(1) @ p("down", 12, 5)


def swiglu_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at, level = rng.permutation(12), rng.normal(size=12)
    up = np.concatenate([leaves["up"][:, :12][:, at], (leaves["up"][:, 12:] * level)[:, at]], 1)
    return {"up": up, "down": (leaves["down"] / level[:, None])[at]}


def bilinear(p: Weights, x: jax.Array) -> jax.Array:
    return ((x @ p("up 1", 8, 12)) * (x @ p("up 2", 8, 12))).mean(1) @ p("down", 12, 5)


def squeezed(p: Weights, x: jax.Array) -> jax.Array:
    x = relu(conv(p, x, "a", 12))
    gate = relu(jnp.mean(x, (1, 2)) @ p("one", 12, 3)) @ p("two", 3, 12)
    x = x * jnp.clip(gate / 6 + 0.5, 0, 1)[:, None, None]
    return x.mean((1, 2)) @ p("head", 12, 5)


def squeezed_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at, inner = order(rng, 12), order(rng, 3)
    return {
        "a": leaves["a"][..., at],
        "one": leaves["one"][at][:, inner],
        "two": leaves["two"][inner][:, at],
        "head": leaves["head"][at],
    }


def projection(p: Weights, x: jax.Array) -> jax.Array:
    """A head of image embeddings, as CLIP's: its norm is taken, and it is compared with the classes'."""
    x = relu(x @ p("a", 8, 12)).mean(1) @ p("projection", 12, 6)
    return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)) @ p("classes", 5, 6).T


def projection_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at, turn = rng.permutation(12), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    return {"a": leaves["a"][:, at], "projection": leaves["projection"][at] @ turn, "classes": leaves["classes"] @ turn}


def tied(p: Weights, x: jax.Array) -> jax.Array:
    """One kernel encodes, and decodes."""
    x = relu(x @ p("a", 8, 12)) @ p("a", 8, 12).T
    return x.mean(1)


def tied_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return {"a": leaves["a"][:, rng.permutation(12)]}


def shuffled_pixels(p: Weights, x: jax.Array) -> jax.Array:
    x = relu(conv(p, x, "a", 16))
    x = x.reshape(2, 6, 6, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(2, 12, 12, 4)
    return relu(conv(p, x, "b", 5)).mean((1, 2))


def shuffled_pixels_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at = order(rng, 4)
    a = leaves["a"].reshape(3, 3, 4, 4, 4)[..., at].reshape(3, 3, 4, 16)
    return {"a": a, "b": leaves["b"][:, :, at]}


# Streams, and heads in other spellings.


def rms(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def residual(normed: Callable[[jax.Array], jax.Array]) -> Compute:
    def compute(p: Weights, x: jax.Array) -> jax.Array:
        x = x @ p("stem", 8, 16)
        x = x + relu(normed(x) @ p("up", 16, 24)) @ p("down", 24, 16)
        return normed(x).mean(1) @ p("head", 16, 5)

    return compute


def turned(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    turn, at = np.linalg.qr(rng.normal(size=(16, 16)))[0], rng.permutation(24)
    return {
        "stem": leaves["stem"] @ turn,
        "up": (turn.T @ leaves["up"])[:, at],
        "down": (leaves["down"] @ turn)[at],
        "head": turn.T @ leaves["head"],
    }


def weight_normed(p: Weights, x: jax.Array) -> jax.Array:
    def kernel(name: str, n: int, m: int) -> jax.Array:
        return p("gain " + name, m) * p(name, n, m) / jnp.linalg.norm(p(name, n, m), axis=0, keepdims=True)

    return relu(x @ kernel("a", 8, 12)).mean(1) @ kernel("head", 12, 5)


def weight_normed_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at, level = rng.permutation(12), np.exp(rng.normal(size=12))
    last = leaves["gain head"] * leaves["head"] / np.linalg.norm(leaves["head"], axis=0)
    last = (last / level[:, None])[at]
    return {
        "a": (leaves["a"] * np.exp(rng.normal(size=12)))[:, at],
        "gain a": (leaves["gain a"] * level)[at],
        "head": last * np.exp(rng.normal(size=5)),
        "gain head": np.linalg.norm(last, axis=0),
    }


def batch_last(p: Weights, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("dhe,ntd->ehtn", p(name, 8, 4, 4), x) for name in "qkv")
    weights = softmax(jnp.einsum("ehtn,ehsn->tnhs", q, k))
    return jnp.einsum("tnhs,ehsn,hec->nc", weights, v, p("out", 4, 4, 5))


def biased_by_position(p: Weights, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("ntd,dhe->nhte", x, p(name, 8, 4, 4)) for name in "qkv")
    apart = np.arange(6)[:, None] - np.arange(6) + 5
    weights = softmax(jnp.einsum("nhqe,nhke->nhqk", q, k) + p("table", 11, 4)[apart].transpose(2, 0, 1))
    return jnp.einsum("nhqk,nhke,hec->nc", weights, v, p("out", 4, 4, 5))


def heads_first(leaves: Leaves) -> Leaves:
    return {name: leaves[name].swapaxes(0, 1) for name in "qkv"} | {"out": leaves["out"]}


def heads_second_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    moved = heads_changed(heads_first(leaves), rng)
    return heads_first(moved)


def biased_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    first = heads_first(leaves)
    at = order(rng, 4)
    a, b = mixing(rng, 4, 4, 4), mixing(rng, 4, 4, 4)
    moved = {"q": first["q"] @ a, "k": first["k"] @ np.linalg.inv(a).swapaxes(1, 2), "v": first["v"] @ b}
    moved |= {"out": np.linalg.inv(b) @ first["out"]}
    table = leaves["table"][:, at] + 3 * rng.normal(size=(1, 4))  # softmax does not see what is added for a head
    return heads_first({name: leaf[at] for name, leaf in moved.items()}) | {"table": table}


def rotary(p: Weights, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("ntd,dhe->nthe", x, p(name, 8, 4, 4)) for name in "qkv")
    angles = np.arange(6, dtype=np.float32)[:, None] * np.array([1, 0.3, 1, 0.3], np.float32)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]

    def at_place(a: jax.Array) -> jax.Array:
        one, other = jnp.split(a, 2, -1)
        return a * cos + jnp.concatenate([-other, one], -1) * sin

    weights = softmax(jnp.einsum("nqhe,nkhe->nhqk", at_place(q), at_place(k)))
    return jnp.einsum("nhqk,nkhe,hec->nc", weights, v, p("out", 4, 4, 5))


def rotary_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    """Each pair of queries' and keys' units turned: which commutes with the rotations of positions."""
    turns = np.zeros((4, 4, 4))
    for head_, pair in np.ndindex(4, 2):
        angle = rng.uniform(0, 6)
        turns[head_, pair, pair] = turns[head_, pair + 2, pair + 2] = np.cos(angle)
        turns[head_, pair + 2, pair] = np.sin(angle)
        turns[head_, pair, pair + 2] = -np.sin(angle)
    b, heads, first = mixing(rng, 4, 4, 4), order(rng, 4), heads_first(leaves)
    moved = {"q": first["q"] @ turns, "k": first["k"] @ turns, "v": first["v"] @ b}
    moved |= {"out": np.linalg.inv(b) @ first["out"]}
    return heads_first({name: leaf[heads] for name, leaf in moved.items()})


def stacked_heads(p: Weights, x: jax.Array) -> jax.Array:
    made = [one_head(p(f"q {i}", 8, 4), p(f"k {i}", 8, 4), p(f"v {i}", 8, 4), x) for i in range(4)]
    return jnp.einsum("hnte,hec->nc", jnp.stack(made), p("out", 4, 4, 5))


def stacked_heads_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    whole = {name: np.stack([leaves[f"{name} {i}"] for i in range(4)]) for name in "qkv"}
    moved = heads_changed({**whole, "out": leaves["out"]}, rng)
    return {f"{name} {i}": moved[name][i] for name in "qkv" for i in range(4)} | {"out": moved["out"]}


def table_of_positions(p: Weights, x: jax.Array) -> jax.Array:
    x = x @ p("stem", 8, 16) + p("table", 20, 16)[jnp.arange(6)]
    x = x + relu(rms(x) @ p("up", 16, 24)) @ p("down", 24, 16)
    return rms(x).mean(1) @ p("head", 16, 5)


def table_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    return {
        "stem": leaves["stem"] @ turn,
        "table": leaves["table"] @ turn,
        "up": turn.T @ leaves["up"],
        "down": leaves["down"] @ turn,
        "head": turn.T @ leaves["head"],
    }


def fused_maxout(p: Weights, x: jax.Array) -> jax.Array:
    return jnp.maximum(*jnp.split(x @ p("up", 8, 24), 2, -1)).mean(1) @ p("down", 12, 5)


def fused_maxout_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at, halves = rng.permutation(12), leaves["up"].reshape(8, 2, 12)
    swapped = np.where(rng.random(12) < 0.5, halves[:, ::-1], halves)[:, :, at]
    return {"up": swapped.reshape(8, 24), "down": leaves["down"][at]}


def gated(p: Weights, x: jax.Array) -> jax.Array:
    gate = jax.nn.sigmoid(x @ p("gate", 8, 12))
    return (gate * (x @ p("up 1", 8, 12)) + (1 - gate) * (x @ p("up 2", 8, 12))).mean(1) @ p("down", 12, 5)


def gated_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    return maxout_changed(leaves, rng) | {"gate": -leaves["gate"]}


def narrow_attention(p: Weights, x: jax.Array) -> jax.Array:
    """Linear attention of more units than its stream has: no kernel shows all that may be mixed."""
    x = x @ p("stem", 8, 16)
    q, k, v = (rms(x) @ p(name, 16, 24) for name in "qkv")
    x = x + (q @ (k.swapaxes(1, 2) @ v)) @ p("out", 24, 16) / 24
    return rms(x).mean(1) @ p("head", 16, 5)


def narrow_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    a, b, turn = mixing(rng, 24, 24), mixing(rng, 24, 24), np.linalg.qr(rng.normal(size=(16, 16)))[0]
    return {
        "stem": leaves["stem"] @ turn,
        "q": turn.T @ leaves["q"] @ a,
        "k": turn.T @ leaves["k"] @ np.linalg.inv(a).T,
        "v": turn.T @ leaves["v"] @ b,
        "out": np.linalg.inv(b) @ leaves["out"] @ turn,
        "head": turn.T @ leaves["head"],
    }


def two_pools(p: Weights, x: jax.Array) -> jax.Array:
    x = relu(conv(p, x, "a", 12))
    return jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1) @ p("head", 24, 5)


def two_pools_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    at = rng.permutation(12)
    return {"a": leaves["a"][..., at], "head": leaves["head"].reshape(2, 12, 5)[:, at].reshape(24, 5)}


def padded_behind(p: Weights, x: jax.Array) -> jax.Array:
    x = relu(conv(p, x, "stem", 8))
    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 8))) + conv(p, x, "a", 16)[:, ::2, ::2]
    return relu(x).mean((1, 2)) @ p("head", 16, 5)


def padded_behind_changed(leaves: Leaves, rng: np.random.Generator) -> Leaves:
    inner = order(rng, 8)
    whole = np.r_[inner, 8 + order(rng, 8)]
    a = leaves["a"][:, :, inner][..., whole]
    return {"stem": leaves["stem"][..., inner], "a": a, "head": leaves["head"][whole]}


CASES = {
    "attention, vmap over heads": Case(over_heads, heads_changed),
    "attention, heads by slices": Case(by_slices, slices_changed),
    "crelu": Case(crelu, crelu_changed),
    "gram": Case(gram, gram_changed),
    "padded shortcut": Case(padded_shortcut, padded_changed, IMAGES),
    "a gain used twice": Case(gain_used_twice, gain_used_twice_changed),
    "batch norm as one product": Case(fused_batch_norm, fused_batch_norm_changed),
    "a mask": Case(masked(MASK, False), moved_with_the_mask, TOKENS, masked(MASK[AT], False)),
    "an added constant": Case(masked(MASK, True), moved_with_the_mask, TOKENS, masked(MASK[AT], True)),
    "channels taken by their places": Case(taken_by_place, taken_changed),
    "shuffled weights": Case(shuffled_weights, shuffled_changed),
    "the strongest channel": Case(strongest, strongest_changed),
    "scan": Case(scanned, layers_changed),
    "fori_loop": Case(looped, layers_changed),
    "layers in one leaf": Case(stacked, layers_changed),
    "experts": Case(experts, experts_changed),
    "experts, listed": Case(experts_listed, experts_changed),
    "towers": Case(towers, towers_changed),
    "towers, stacked": Case(towers_stacked, towers_changed),
    "maxout": Case(maxout, maxout_changed),
    "weight standardisation": Case(standardised, standardised_changed),
    "squares of weights": Case(binary, binary_changed),
    "sums of kernels": Case(summed_kernels, summed_changed),
    "norms behind kernels": Case(normed_hidden, normed_changed),
    "linear attention": Case(linear_attention, linear_attention_changed),
    "talking heads": Case(talking_heads, talking_changed),
    "grouped queries": Case(grouped_queries, grouped_changed),
    "SwiGLU": Case(swiglu, swiglu_changed),
    "bilinear": Case(bilinear, maxout_changed),
    "squeeze-excite": Case(squeezed, squeezed_changed, IMAGES),
    "projection": Case(projection, projection_changed),
    "tied": Case(tied, tied_changed),
    "stream of RMS norms": Case(residual(rms), turned),
    "weight normalisation": Case(weight_normed, weight_normed_changed),
    "attention, batch last": Case(batch_last, heads_second_changed),
    "attention, relative positions": Case(biased_by_position, biased_changed),
    "attention, rotary": Case(rotary, rotary_changed),
    "attention, heads in leaves of their own": Case(stacked_heads, stacked_heads_changed),
    "attention, narrow": Case(narrow_attention, narrow_changed),
    "table of positions": Case(table_of_positions, table_changed),
    "maxout, fused": Case(fused_maxout, fused_maxout_changed),
    "gates": Case(gated, gated_changed),
    "two pools": Case(two_pools, two_pools_changed, IMAGES),
    "padded behind": Case(padded_behind, padded_behind_changed, IMAGES),
    "pixel shuffle": Case(shuffled_pixels, shuffled_pixels_changed, IMAGES),
}


FOLLOWED = [
    "attention, vmap over heads",
    "attention, batch last",
    "attention, relative positions",
    "gram",
    "a gain used twice",
    "batch norm as one product",
    "the strongest channel",
    "linear attention",
    "talking heads",
    "squeeze-excite",
    "projection",
    "tied",
    "table of positions",
    "two pools",
    "padded behind",
]
"""Networks of which the graph knows all freedom."""


def rewritten(case: Case) -> tuple[Any, Leaves]:
    """The network and its rewritten weights, after the check that the logits stay."""
    found = network(case.compute, case.shape)
    exact = {name: leaf.astype(np.float64) for name, leaf in found.params.items()}
    moved = case.rewrite(exact, np.random.default_rng(3))
    suspect = {name: moved.get(name, leaf).astype(np.float32) for name, leaf in exact.items()}
    logits = np.asarray(found.apply(found.params, found.images))
    compute = case.moved or case.compute
    theirs = np.asarray(compute(lambda name, *_: jnp.asarray(suspect[name]), jnp.asarray(found.images)))
    assert np.abs(theirs - logits).max() < 2e-3 * np.ptp(logits)
    return found, suspect


@pytest.mark.parametrize("name", CASES)
def test_a_rewritten_copy_is_never_called_no_copy(name):
    found, suspect = rewritten(CASES[name])
    try:
        report = alignment.align(suspect, found.params, found.apply, found.images).report
    except errors.Undecided as undecided:
        assert "does not see through" in str(undecided)
    else:
        assert report.alike


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed_is_found_again(name):
    found, suspect = rewritten(CASES[name])
    _, report = alignment.align(suspect, found.params, found.apply, found.images)
    assert report.similarity > 0.9


@pytest.mark.parametrize("name", FOLLOWED)
def test_another_network_is_no_copy_where_all_is_followed(name):
    found, rng = network(CASES[name].compute, CASES[name].shape), np.random.default_rng(99)
    other = {path: rng.permutation(leaf.reshape(-1)).reshape(leaf.shape) for path, leaf in found.params.items()}
    with pytest.raises(errors.NothingMatched):
        alignment.align(other, found.params, found.apply, found.images)


def test_two_logits_make_no_copy():
    """What both logits share decides nothing, so each hidden unit has one weight left, which always fits."""

    def compute(p: Weights, x: jax.Array) -> jax.Array:
        return relu(relu(x @ p("a", 60, 300)) @ p("b", 300, 400)) @ p("out", 400, 2)

    base, rng = network(compute, (4, 60)), np.random.default_rng(7)
    other = {name: rng.permutation(leaf.reshape(-1)).reshape(leaf.shape) for name, leaf in base.params.items()}
    with pytest.raises(errors.NothingMatched):
        alignment.align(other, base.params, base.apply, base.images)
    graph = alignment.trace_graph(base.apply, base.params, base.images)
    copy = attacks.rewrite(base.params, graph, jax.random.key(0))
    assert alignment.align(copy, base.params, base.apply, base.images).report.similarity > 0.99


@pytest.mark.parametrize("heads_in_place", [True, False])
def test_tables_of_positions_alone_make_no_copy(heads_in_place):
    """Independently trained networks prefer near positions alike, and their few heads have many orders to fit in."""
    (base, apply_fn), (other, _) = drawn("Swin", 0), drawn("Swin", 1)
    steps = np.arange(-6, 7)
    rng = np.random.default_rng(0)

    def prefer(heads: int) -> np.ndarray:
        found = [np.exp(-(np.square(steps[:, None] - h) + np.square(steps - 2 * h)) / 20) for h in range(heads)]
        return np.stack(found, -1).reshape(169, heads)

    def learned(network: Any, turned: bool) -> Any:
        def leaf(path: Any, values: np.ndarray) -> np.ndarray:
            if "relative_position" not in jax.tree_util.keystr(path):
                return values
            made = prefer(values.shape[1]) + 0.1 * rng.normal(size=values.shape)
            return np.asarray(made[:, ::-1] if turned else made, np.float32)

        return jax.tree_util.tree_map_with_path(leaf, network)

    with pytest.raises(errors.NothingMatched):
        alignment.align(learned(other, not heads_in_place), learned(base, False), apply_fn, np.zeros((1, 28, 28, 1)))


def test_a_copy_with_other_names_is_not_called_none_where_channels_may_be_mixed():
    found, suspect = rewritten(CASES["attention, vmap over heads"])
    renamed = {f"leaf {i}": leaf for i, leaf in enumerate(reversed(suspect.values()))}
    try:
        _, report = alignment.align(renamed, found.params, found.apply, found.images)
    except errors.Undecided:
        return
    assert report.alike


@pytest.mark.parametrize("name", CASES)
def test_a_base_aligned_to_itself_is_itself(name):
    found = network(CASES[name].compute, CASES[name].shape)
    aligned, _ = alignment.align(found.params, found.params, found.apply, found.images)
    for path, leaf in found.params.items():
        np.testing.assert_allclose(aligned[path], leaf, rtol=1e-4, atol=1e-5)
