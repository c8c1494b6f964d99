"""A Flower app with masked updates: see its README."""
