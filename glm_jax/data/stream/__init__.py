"""Which row comes when: a function of (seed, index)."""
