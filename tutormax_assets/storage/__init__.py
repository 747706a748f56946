"""Parquet: files, a partition and its listing, shards of tutors, what is spooled on the way."""
