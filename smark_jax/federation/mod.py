"""The client's side: a Flower mod that turns a ClientApp's updates into masked ones.

::

    app = ClientApp(mods=[federation.masked_mod])

The client takes its conditions from its own node configuration (``flower-supernode --node-config``), never from what
the server sends. There, put quotes around texts, but not around numbers or true and false. Files:

* ``smark-identity="clinic-a.identity"``: this client's identity, from ``python -m smark_jax.federation keygen``. A
  folder ``clinic-a.identity.answered`` beside it records what was answered (:mod:`~smark_jax.federation.ledger`).
* ``smark-roster="roster.txt"``: the public identities of all clients, one per line, as the operators exchanged them.

Conditions (see :class:`~smark_jax.aggregation.protocol.Policy` and :class:`~smark_jax.federation.task.Limits`):

* ``smark-least-parties=3`` and ``smark-least-share=0.667``: a sum may be opened only if it covers at least this many
  clients, and more than this share of the round's. The default share is two thirds.
* ``smark-corruption-rate=0.05``: accepts sparse mask graphs that are safe if this share of clients is corrupt.
* ``smark-bind-model=false``: accepts that every client gets a different model, which fingerprints require.
* ``smark-least-clip=1e-4``, ``smark-most-clip=1e4``, ``smark-weight="num-examples"``: limits on the formats of updates.

The secrets of a round stay in the context of the run on this client until the round is over. Without the two files, the
client draws an identity and trusts the server's roster. That suffices against a curious server, and for simulations,
but a lying server could then invent clients.
"""

import tempfile
import traceback
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from smark_jax import _validate, errors, keys
from smark_jax.aggregation import protocol
from smark_jax.aggregation.protocol import messages, party
from smark_jax.aggregation.protocol.parameters import refuse
from smark_jax.federation import consent, identities, ledger, task, wire
from smark_jax.federation._log import log

_STATE = "smark"


def masked_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Lets a training update leave this client only under masks, and only under its operator's conditions.

    The wrapped train function gets the message as from any strategy, and returns its arrays and its number of examples
    as usual; only the weighted sum over the clients can be opened. Evaluation and query messages pass unchanged: the
    server sees what they return.

    Raises:
      SmarkError: when the server asks for an unmasked update, breaks the protocol, violates the operator's conditions,
        or repeats a request. The client then answers with an error that contains nothing of its update.
    """
    if not message.metadata.message_type.startswith(MessageType.TRAIN):
        return call_next(message, context)
    asked = wire.take(message.content)
    if asked == wire.Items():
        cause = "Use federation.Masked around the server's strategy, or take masked_mod out of the ClientApp."
        raise _validate.fail("masked_mod", "a request for a masked update", "one for a bare update", cause)
    conditions = consent.read(context.node_config)
    for item in (asked.hello, asked.setup):
        if item is not None:
            conditions.check_session(item.session)
    identity, answered = _identity(context, conditions)
    answers = wire.Items()
    if asked.hello:
        answers = answers._replace(identity=messages.introduce(identity, asked.hello, context.node_id))
    if asked.setup:
        state, answer = party.join(asked.setup, identity, keys.new(), conditions.policy)
        answers = answers._replace(keys=answer)
        _move_on(context, state, answered, "keys")
    for round, request in asked.requests or ():
        state = _load(context, round)
        match request:
            case messages.ShareRequest():
                stage, (state, answer) = "shares", party.share(state, request)
            case messages.MaskRequest():
                words, digest = _train(message, context, call_next, asked.format, state, conditions.limits)
                stage, (state, answer) = "masked", party.mask(state, request, words, digest)
            case messages.ConfirmRequest():
                stage, (state, answer) = "confirm", party.confirm(state, request)
            case _:
                stage, (state, answer) = "reveal", party.unmask(state, request)
        answers = answers._replace(**{stage: answer})
        _move_on(context, state, answered, stage)
    return Message(wire.put(RecordDict(), answers), reply_to=message)


def _train(
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    form: task.Format | None,
    state: party.Party,
    limits: task.Limits,
) -> tuple[np.ndarray, bytes]:
    """The words of this client's update, and the digest of everything that went into it."""
    from smark_jax.federation import update  # loads jax, which only training needs

    if form is None:
        raise refuse("masked_mod", "the format of the update", "none", "Is the server honest?")
    setup = state.setup
    limits.check(form, setup)
    party.expect(state, "masked")  # checked before training, which takes long
    message.metadata.group_id = ""  # masks are not bound to it, so the train function must not see it
    message.content.pop(wire.RECORD, None)
    kind, run_config = message.metadata.message_type, context.run_config
    digest = task.digest(message.content, form, message_type=kind, run_config=run_config, values=setup.bind_model)
    before = wire.tree(message.content.get(form.arrays))
    if form.num_words(before) != setup.num_words:
        expected, got = f"a model of {setup.num_words} words, as in the round's setup", f"{form.num_words(before)}"
        raise refuse("masked_mod", expected, got, "Is the server honest?")
    try:
        reply = call_next(message, context)
    except Exception as error:  # any exception of a train function may reveal its data
        for line in (
            "The train function raised an exception:",
            *"".join(traceback.format_exception(error)).splitlines(),
        ):
            log(ERROR, "%s", line)
        raise _failed() from None
    if reply.has_error():
        log(ERROR, "The train function answered with an error: %s", reply.error.reason)
        raise _failed()
    records = reply.content.array_records
    after = wire.tree(records.get(form.arrays, next(iter(records.values()), None)))
    metrics = {name: value for record in reply.content.metric_records.values() for name, value in record.items()}
    if form.weight not in metrics:
        cause = "Flower's strategies weight by it: return it in the MetricRecord of the train function."
        raise _validate.fail("masked_mod", f"a metric {form.weight!r}", f"{sorted(metrics)}", cause)
    try:
        return update.encode(before, after, metrics, form), digest
    except (TypeError, ValueError, OverflowError) as error:
        log(ERROR, "This update cannot be encoded: %s", error)
        raise _failed() from None


def _failed() -> errors.SmarkError:
    cause = (
        "This client's own log says why; the server is not told, since the reason may reveal something about the data."
    )
    return _validate.fail("masked_mod", "an update to mask", "an error", cause)


def _identity(context: Context, conditions: consent.Consent) -> tuple[keys.SecretKey, Path]:
    """This client's identity, and the folder of its ledger."""
    path = conditions.identity
    if path is not None:
        return identities.read(path), path.with_name(f"{path.name}.answered")
    record = _record(context)
    if "identity" not in record:
        record["identity"] = keys.new().to_bytes()
        record["answered"] = tempfile.mkdtemp(prefix="smark-answered-")
    return keys.from_bytes(record["identity"]), Path(record["answered"])


def _record(context: Context) -> Any:
    if _STATE not in context.state.config_records:
        context.state[_STATE] = ConfigRecord()
    return context.state.config_records[_STATE]


def _load(context: Context, round: int) -> party.Party:
    record = _record(context)
    if f"round {round}" not in record:
        cause = "This client was restarted, or missed the round's beginning; it takes part again from the next round."
        raise _validate.fail("masked_mod", "a request of a round that this client has joined", f"round {round}", cause)
    return wire.load(record[f"round {round}"], party.Party)


def _move_on(context: Context, state: party.Party, answered: Path, stage: str) -> None:
    """Records an answered stage, in the ledger and in the context, before the answer leaves."""
    setup: protocol.Setup = state.setup
    ledger.claim(answered, setup.session, stage, setup.round)
    record = _record(context)
    for name in [name for name in record if name.startswith("round ") and int(name[6:]) < setup.round - 1]:
        del record[name]
    record[f"round {setup.round}"] = wire.dump(state)
