"""The encoder under a chosen visibility, and the heads on it."""
