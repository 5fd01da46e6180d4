"""Training of one run: the loop, the optimiser, evaluation, checkpoints and the record for the store."""
