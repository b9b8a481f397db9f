"""Inference: the key/value cache, sampling, and filling blanks."""
