"""Text to rows: the cache of one run, and the jobs of make_shards."""
