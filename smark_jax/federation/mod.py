"""The client's side: a Flower mod that turns a ClientApp's updates into masked ones.

::

    app = ClientApp(mods=[federation.masked_mod])

Secrets of a round live in the context of the run on this client, until the round is over. Node configuration (of
``flower-supernode --node-config``):

* ``smark-identity``: file with this client's identity, from ``python -m smark_jax.federation keygen``;
* ``smark-roster``: file with the public identities of all clients, one to a line, which the operators exchanged.

Without them the client draws an identity and believes the server's roster. That is enough against a curious server, and
for simulations; a server that lies could then invent clients.
"""

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from smark_jax import _validate, keys
from smark_jax.aggregation import protocol
from smark_jax.aggregation.protocol import messages, party
from smark_jax.federation import identities, wire

_STATE = "smark"


def masked_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Lets a training update leave this client only under masks.

    The wrapped train function gets the message as from any strategy and returns its arrays and the number of its
    examples as usual; only their weighted sum over the clients can be opened. Evaluation and queries pass unchanged:
    what they return is seen by the server.

    Raises:
      ValueError: when the server asks for an unmasked update, or breaks the protocol. The client then answers with an
        error and nothing of its update.
    """
    if not message.metadata.message_type.startswith(MessageType.TRAIN):
        return call_next(message, context)
    asked = wire.take(message.content)
    if not asked:
        cause = "Use federation.Masked around the server's strategy, or take masked_mod out of the ClientApp."
        raise _validate.fail("masked_mod", "a request for a masked update", "one for a bare update", cause)
    answers: dict[str, Any] = {}
    content = RecordDict()
    if "hello" in asked:
        answers["identity"] = messages.identity_key(_identity(context))
    if "setup" in asked:
        answers["keys"] = _join(context, asked["setup"])
    for round, request in asked.get("requests", ()):
        state = _load(context, round)
        match request:
            case messages.ShareRequest():
                state, answers["shares"] = party.share(state, request)
            case messages.MaskRequest():
                words, model = _train(message, context, call_next, asked)
                state, answers["masked"] = party.mask(state, request, words, model)
            case messages.ConfirmRequest():
                state, answers["confirm"] = party.confirm(state, request)
            case _:
                state, answers["reveal"] = party.unmask(state, request)
        _save(context, state)
    return Message(wire.put(content, **answers), reply_to=message)


def _train(
    message: Message, context: Context, call_next: ClientAppCallable, asked: dict[str, Any]
) -> tuple[np.ndarray, bytes]:
    """Words of this client's update, and the hash of the model that it was computed from."""
    from smark_jax.federation import update  # loads jax, which only training needs

    form = update.Format(*asked["format"])
    del message.content[wire.RECORD]
    before = wire.tree(next(iter(message.content.array_records.values())))
    model = update.digest(before)
    reply = call_next(message, context)
    if reply.has_error():
        raise RuntimeError(f"The train function answered with an error: {reply.error.reason}")
    after = wire.tree(next(iter(reply.content.array_records.values())))
    metrics = {name: value for record in reply.content.metric_records.values() for name, value in record.items()}
    if form.weight not in metrics:
        cause = "Flower's strategies weight by it: return it in the MetricRecord of the train function."
        raise _validate.fail("masked_mod", f"a metric {form.weight!r}", f"{sorted(metrics)}", cause)
    return update.encode(before, after, metrics, form), model


def _join(context: Context, setup: protocol.Setup) -> messages.Keys:
    identities.check_roster(context.node_config.get("smark-roster"), setup)
    state, message = party.join(setup, _identity(context), keys.new())
    _save(context, state)
    return message


def _identity(context: Context) -> keys.SecretKey:
    path = context.node_config.get("smark-identity")
    if path is not None:
        return identities.read(Path(str(path)))
    record = _record(context)
    if "identity" not in record:
        record["identity"] = keys.new().to_bytes()
    return keys.from_bytes(record["identity"])


def _record(context: Context) -> Any:
    if _STATE not in context.state.config_records:
        context.state[_STATE] = ConfigRecord()
    return context.state.config_records[_STATE]


def _load(context: Context, round: int) -> party.Party:
    record = _record(context)
    if f"round {round}" not in record:
        cause = "This client was restarted, or missed the round's beginning; it takes part again from the next round."
        raise _validate.fail("masked_mod", "a request of a round that this client has joined", f"round {round}", cause)
    return wire.load(record[f"round {round}"])


def _save(context: Context, state: party.Party) -> None:
    record = _record(context)
    for name in [name for name in record if name.startswith("round ") and int(name[6:]) < state.setup.round - 1]:
        del record[name]
    record[f"round {state.setup.round}"] = wire.dump(state)
