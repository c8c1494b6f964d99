"""A participant that sends its updates unmasked."""

from digits.client_app import train  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp

app = ClientApp()
app.train()(train)
