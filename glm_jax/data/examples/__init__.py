"""A row to model inputs: spans, infilling, next tokens, packed rows, as text."""
