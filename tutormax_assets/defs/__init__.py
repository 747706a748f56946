"""What Dagster sees: assets, checks, automation, resources, the IO manager."""
