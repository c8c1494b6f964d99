"""Networks in the files of other frameworks: parsed without their packages, and run as pure functions of JAX."""
