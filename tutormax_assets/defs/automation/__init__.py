"""What runs by itself: the schedule, the dates of a failed range one by one, retention, alerts."""
