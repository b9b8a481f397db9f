"""Training: configuration, losses, optimizer, state, step, metrics, reports."""
