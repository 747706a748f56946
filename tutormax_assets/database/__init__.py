"""The metrics database: connections, faults, the table and its locks, archive, embedded server."""
