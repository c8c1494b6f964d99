"""A participant whose bare updates the server sees."""

from digits.client_app import train  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp

app = ClientApp()
app.train()(train)
