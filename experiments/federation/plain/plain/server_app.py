"""Plain FedAvg."""

from digits.server_app import train  # pyright: ignore[reportMissingImports]
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains, and writes a line for every round."""
    clients = int(str(context.run_config["clients"]))
    train(grid, context, FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=clients))
