"""A participant under Flower's SecAgg+."""

import numpy as np
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp


class Participant(NumPyClient):
    """Trains as the participants of the masked app do."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        from experiments.federation.app.digits import task  # imported only for training, as in the masked app

        settings = self._context.run_config
        record = task.to_record(task.initial(settings))
        given = task.named(parameters, record)
        index = int(self._context.node_config["partition-id"])
        arrays, examples, loss = task.train(given, index, int(config["round"]), settings)
        return arrays.to_numpy_ndarrays(), examples, {"train-loss": loss}


def client_fn(context: Context) -> Client:
    return Participant(context).to_client()


app = ClientApp(client_fn=client_fn, mods=[secaggplus_mod])
