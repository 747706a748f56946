"""What the numbers mean: pure functions from lazy frames to lazy frames.

No orchestration, no database, no environment and no clock; dates and policy are arguments.
"""
