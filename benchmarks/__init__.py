"""What the README's tables are made with; run as `python -m benchmarks.NAME`."""
