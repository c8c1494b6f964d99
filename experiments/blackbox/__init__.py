"""What can be done where nobody shows weights: payloads in images, traces by answers alone."""
