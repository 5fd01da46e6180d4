"""Auxiliary objectives on images: the taxonomy of the four stages, corruptions, labels and batches."""
