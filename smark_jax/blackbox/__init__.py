"""What can be done where nobody shows weights: payloads in images."""

from smark_jax.blackbox.payload import PAYLOAD_BITS, mark_images, read_images

__all__ = ["PAYLOAD_BITS", "mark_images", "read_images"]
