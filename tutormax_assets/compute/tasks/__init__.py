"""What is done with a shard of tutors at each stage, by this process or by another one.

A task says where the rows are and where the result goes; a report says what was stored. Both are
small and can be sent. Every task can be repeated. Nothing here knows Dagster, so that a worker does
not pay for it.
"""
