"""Performance: chips, compiled text, step-time estimates."""
