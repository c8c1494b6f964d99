"""The measured claims of licences: framing, guilt, and price."""
