"""The benchmark: the product against other ways to the same rows, on the same PostgreSQL."""
