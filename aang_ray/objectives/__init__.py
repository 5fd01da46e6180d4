"""The taxonomy of auxiliary objectives: spaces, transforms, representations, outputs, batches."""
