"""Breaks the product on purpose and counts what is lost: ``python -m chaos``."""
