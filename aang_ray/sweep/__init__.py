"""A grid of cells, one Ray Tune trial a cell; running it again is resuming it."""
