"""What Dagster sees: assets, checks, automation and resources."""
