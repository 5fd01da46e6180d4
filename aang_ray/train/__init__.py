"""One run: the loop, its optimiser, evaluation, and what it leaves for the store."""
