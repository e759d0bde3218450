"""Training: configuration, state, step, evaluation, checkpoints and the loop that joins them."""
