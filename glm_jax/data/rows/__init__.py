"""Tokens in rows of one length: the table, shards of it, and their reader."""
