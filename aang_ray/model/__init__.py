"""The encoder, whose attention follows a given visibility, and its heads."""
