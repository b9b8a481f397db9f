"""Where text comes from, and what of it is held out."""
