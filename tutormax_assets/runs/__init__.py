"""The Dagster instance and the runs on it."""
