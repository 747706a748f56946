"""Reading the platform, from PostgreSQL or from a lake of Parquet."""
