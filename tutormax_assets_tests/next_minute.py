"""The code location with one more schedule: the job of the day, at the minute that is asked for.

``dagster api grpc -m`` loads this module; nothing imports it.
"""

import os

import dagster as dg

from tutormax_assets.definitions import build_definitions
from tutormax_assets.settings import load_settings

SCHEDULE_NAME = "next_minute"
HOUR_AND_MINUTE = "NEXT_MINUTE"
"""Environment variable that says when, as 14:05 in the timezone of the partitions."""


def build_definitions_with_schedule() -> dg.Definitions:
    definitions = build_definitions(load_settings())
    hour, minute = map(int, os.environ[HOUR_AND_MINUTE].split(":"))
    [job] = [job for job in definitions.jobs or [] if job.name == "daily_metrics"]
    assert not isinstance(job, dg.JobDefinition)
    schedule = dg.build_schedule_from_partitioned_job(
        job,
        name=SCHEDULE_NAME,
        hour_of_day=hour,
        minute_of_hour=minute,
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    return dg.Definitions.merge(definitions, dg.Definitions(schedules=[schedule]))


if HOUR_AND_MINUTE in os.environ:
    defs = build_definitions_with_schedule()
