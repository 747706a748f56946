"""The tutoring platform's PostgreSQL: tables, connection, snapshot, metrics table."""
