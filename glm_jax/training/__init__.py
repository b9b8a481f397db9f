"""Training: loss, optimizer, state, step, checkpoint, metrics."""
