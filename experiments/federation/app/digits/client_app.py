"""A participant. The mod, a single line, masks its updates."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from smark_jax.federation import masked_mod

app = ClientApp(mods=[masked_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains on this participant's digits."""
    from digits import task  # heavy imports only for training, since each message starts a process

    index = int(str(context.node_config["partition-id"]))
    round_ = int(str(message.content.config_records["config"]["server-round"]))
    given = message.content.array_records["arrays"]
    arrays, examples, loss = task.train(given, index, round_, context.run_config)
    metrics = MetricRecord({"num-examples": examples, "train-loss": loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
