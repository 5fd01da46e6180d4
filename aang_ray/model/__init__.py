"""The encoder, which runs under a given visibility, and the heads on it."""
