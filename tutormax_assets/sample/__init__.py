"""A generated platform, in PostgreSQL or as a lake."""
