"""What this project claims about coalitions, measured by one command: ``python -m experiments.collusion``."""
