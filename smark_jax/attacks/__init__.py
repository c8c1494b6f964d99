"""What a leaker may do to a copy before it turns up: pure functions from parameters to parameters."""

from smark_jax.attacks.removal import fine_tune, prune, quantise

__all__ = ["fine_tune", "prune", "quantise"]
