"""Reads the network in a file of Keras: its configuration, which lists layers and says which takes what of which.

Sequential and functional models of Keras 2 and 3 are read, nested ones among them. A layer becomes a node of the graph
under the name of its class, and its activation another. Nothing in the configuration runs: a layer that holds code,
such as Lambda, is an operator that is not supported.

References:
  ``get_config`` of ``keras/src/models/functional.py`` and ``sequential.py``; ``keras/src/saving/serialization_lib.py``.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _keras, _limits
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph as graphs
from smark_jax.files.networks.graph import Graph, Node, Tensor, Value

_AGAIN = "The file is damaged, or written by another version of Keras: save it again with Keras 3."
_MODELS = ("Functional", "Sequential", "Model")
_SOFTMAX = "softmax"
_MAX_LAYERS = 20_000
_MAX_PARTS = 2**20  # of the arguments of all calls, and weights of all layers called: a model may be called again


class _Result(NamedTuple):
    """A reference in a configuration to a result: of a layer, of one of its calls, and which of its results."""

    layer: str
    call: int
    number: int


class _Layer(NamedTuple):
    """A layer of a model: its class, its configuration, its names, and the arguments of each of its calls."""

    kind: str
    config: Mapping[str, Any]
    path: tuple[str, ...]
    calls: list[tuple[list[Any], dict[str, Any]]]
    older: bool


def load(source: Source, max_bytes: int) -> Graph:
    """The network in a file's content.

    Raises:
      Unreadable: when the content holds weights alone, is no model of one input, or is beyond a limit.
    """
    found = _keras.opened(source.data, max_bytes)
    if found.config is None:
        raise Unreadable("it holds the weights of Keras, and no network", "Save the whole model (model.save).")
    arrays = _keras.leaves(found)
    try:
        model = json.loads(_limits.json_text(found.config.encode()))
        builder = _Builder(list(arrays), found.named)
        output = builder.model(model, (), Value("images"))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"its configuration is not as Keras writes it ({shown(str(error))})", _AGAIN) from None
    floats = {name: leaf for name, leaf in arrays.items() if not isinstance(leaf, Foreign) and _real(leaf)}
    graph = Graph(
        tuple(builder.nodes),
        {name: Tensor(leaf) for name, leaf in arrays.items()},
        {name: name for name in floats},
        "images",
        _shape(model["config"]),
        output.name,
    )
    return graphs.needed(graphs.without_softmax(graph, _SOFTMAX))


def _real(leaf: np.ndarray) -> bool:
    return leaf.dtype.kind == "f" or leaf.dtype == _limits.DTYPES["BF16"]


class _Builder:
    """Collects the nodes of a model and of the models in it."""

    def __init__(self, leaves: list[str], named: bool) -> None:
        self.nodes: list[Node] = []
        self._left, self._parts = _MAX_LAYERS, _MAX_PARTS
        self._named = named
        self._leaves: dict[str, list[str]] = {}
        for leaf in leaves:
            steps = leaf.split("/")
            for end in range(max(len(steps) - 2, 1), len(steps)):  # attention has layers of its own, others none
                self._leaves.setdefault("/".join(steps[:end]), []).append(leaf)

    def model(self, spec: Mapping[str, Any], path: tuple[str, ...], images: Any) -> Value:
        """Adds the nodes of a model that is called with ``images``, and returns its first result."""
        config = spec["config"]
        layers = config["layers"] if isinstance(config, dict) else config  # a list in Sequential of Keras 1
        self._spend(len(layers), sum(_parts(layer.get("inbound_nodes", [])) for layer in layers))
        classes: Counter[str] = Counter()
        by_name: dict[str, _Layer] = {}
        for layer in layers:
            name, group = _name(layer), _snake(layer["class_name"])
            number = classes[group]
            classes[group] += 1
            step = name if self._named else f"{group}_{number}" if number else group
            calls = [_call(call) for call in layer.get("inbound_nodes", [])]
            older = "module" not in layer
            by_name[name] = _Layer(layer["class_name"], layer["config"], (*path, step), calls, older)
        if spec["class_name"] != "Sequential":
            return self._functional(config, by_name, images)
        for layer in by_name.values():
            images = self._called(layer, [images], {})
        return images

    def _functional(self, config: Mapping[str, Any], layers: Mapping[str, _Layer], images: Any) -> Value:
        """Adds the calls on which the first result depends, each after those whose results it takes."""
        inputs, outputs = (_results(config[key]) for key in ("input_layers", "output_layers"))
        if len(inputs) != 1:
            raise Unreadable(f"a model in it takes {len(inputs)} inputs", "It must take images alone.")
        done: dict[tuple[str, int], Any] = {inputs[0][:2]: images}
        last = outputs[0][:2]
        waiting, begun = [last], set()
        while waiting:
            key = waiting[-1]
            if key in done:
                waiting.pop()
                continue
            layer = layers[key[0]]
            positional, named = layer.calls[key[1]]
            before = [result[:2] for result in _within([positional, named]) if result[:2] not in done]
            if before and key in begun:
                raise Unreadable(f"its layer {shown(key[0])} takes its own result", _AGAIN)
            if before:
                begun.add(key)
                waiting += before
                continue
            taken = [_filled(argument, done) for argument in positional]
            done[key] = self._called(layer, taken, {name: _filled(value, done) for name, value in named.items()})
        return done[last]

    def _called(self, layer: _Layer, positional: list[Any], named: Mapping[str, Any]) -> Value:
        """Adds a layer that is called with these arguments, and its activation."""
        steps = list(layer.path)
        own = "/".join(steps)
        if own not in self._leaves and len(steps) > 2:  # the older layout names the outermost model alone
            own = f"{steps[0]}/{steps[-1]}"
        self._spend(1, len(self._leaves.get(own, [])))
        kind, config = layer.kind, layer.config
        if kind == "InputLayer":
            return positional[0]
        if kind in _MODELS:
            (images,) = positional
            return self.model({"class_name": kind, "config": config}, layer.path, images)
        odd = [name for name, value in named.items() if value not in (None, False) and not isinstance(value, Value)]
        if odd:
            raise Unreadable(f"its layer {shown(steps[-1])} is called with {shown(odd[0])}", _AGAIN)
        settings = {"config": config, **{name: value for name, value in named.items() if isinstance(value, Value)}}
        settings |= {leaf[len(own) + 1 :]: Value(leaf) for leaf in self._leaves.get(own, [])}
        activation = config.get("activation")
        if kind != "Activation":
            positional = [self._add(kind, positional, settings)]
        if activation is None:
            return positional[0]
        if isinstance(activation, dict) and isinstance(activation["config"], dict):  # a layer, as an activation
            return self._add(activation["class_name"], positional, {"config": activation["config"]})
        name = activation["config"] if isinstance(activation, dict) else activation
        older = layer.older and name == "hard_sigmoid"  # which Keras 3 defines anew
        return self._add(f"{name} of Keras 2" if older else str(name), positional, {"config": {}})

    def _add(self, op: str, positional: list[Any], settings: Mapping[str, Any]) -> Value:
        name = f"{settings['config'].get('name', op)} #{len(self.nodes)}"
        self.nodes.append(Node(_SOFTMAX if op == "Softmax" else op, name, tuple(positional), settings, (name,)))
        return Value(name)

    def _spend(self, layers: int, parts: int) -> None:
        self._left, self._parts = self._left - layers, self._parts - parts
        if self._left < 0 or self._parts < 0:
            raise Unreadable(f"it has more than {_MAX_LAYERS:,} layers and calls of them, or far too long ones", _AGAIN)


def _parts(value: Any) -> int:
    """The number of values in one that JSON describes."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_parts, inner))


def _name(layer: Mapping[str, Any]) -> str:
    return _limits.check_name(layer["config"]["name"])


def _snake(kind: str) -> str:
    """The name of a class as it stands in weights: ``Conv2D`` is ``conv2d``."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _call(call: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call: of Keras 3, a dict of them; of Keras 2, a list of results, each with further ones."""
    if isinstance(call, dict):
        return [_argument(value) for value in call["args"]], {k: _argument(v) for k, v in call["kwargs"].items()}
    results = [_Result(*entry[:3]) for entry in call]
    named = {name: value for entry in call if len(entry) > 3 for name, value in entry[3].items()}
    if any(isinstance(value, list) for value in named.values()):  # such as a second operand
        raise Unreadable("a layer of it takes further arguments", _AGAIN)
    return [results if len(results) > 1 else results[0]], named


def _argument(value: Any) -> Any:
    """An argument of a call in Keras 3: results as references, slices as slices, other values as they are."""
    if isinstance(value, list):
        return [_argument(part) for part in value]
    if not isinstance(value, dict):
        return value
    kind, config = value["class_name"], value["config"]
    if kind == "__keras_tensor__":
        return _Result(*config["keras_history"])
    if kind == "__slice__":
        return slice(config["start"], config["stop"], config["step"])
    if kind == "__ellipsis__":
        return ...
    raise Unreadable(f"it has an argument of kind {shown(kind)}", _AGAIN)


def _results(value: Any) -> list[_Result]:
    """The results that are inputs or outputs of a model: one, or a list or a dict of them."""
    if isinstance(value, dict):
        value = list(value.values())
    if len(value) == 3 and isinstance(value[0], str):
        return [_Result(*value)]
    return [result for part in value for result in _results(part)]


def _within(value: Any) -> Iterator[_Result]:
    """The references in arguments."""
    if isinstance(value, _Result):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _within(part)


def _filled(value: Any, done: Mapping[tuple[str, int], Any]) -> Any:
    if isinstance(value, _Result):
        if value.number:
            raise Unreadable(f"its layer {shown(value.layer)} gives several results", _AGAIN)
        return done[value[:2]]
    return [_filled(part, done) for part in value] if isinstance(value, list) else value


def _shape(config: Any) -> tuple[int | None, ...]:
    """The shape of images, None where any length fits; empty if the configuration does not tell it."""
    first = (config["layers"] if isinstance(config, dict) else config)[0]["config"]
    shape = first.get("batch_shape") or first.get("batch_input_shape")
    if shape is None and isinstance(config, dict):
        shape = config.get("build_input_shape")
    return tuple(n if type(n) is int and 0 < n < 2**31 else None for n in shape or ())
