"""Black-box methods, for suspects whose weights are hidden: payloads in images, and tracing by answers alone."""
