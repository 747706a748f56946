"""The log of a run: one line a message, with time and level, on the logger ``tutormax_assets``."""

import logging

import dagster as dg

LOGGER = "tutormax_assets"


@dg.logger(
    config_schema=None,
    description="One line a message on the logger tutormax_assets, without Dagster's ids.",
)
def line_logger(_: dg.InitLoggerContext) -> logging.Logger:
    """What the assets say in a run, at its own level; what Dagster's engine says, at DEBUG."""
    logger = logging.getLogger(f"{LOGGER}.run")
    logger.setLevel(logging.DEBUG)
    if not logger.filters:
        logger.addFilter(_rewrite)
    return logger


def _rewrite(record: logging.LogRecord) -> bool:
    # Dagster puts job, run id and step before the message, and the trace of errors behind it.
    record.msg = record.__dict__["dagster_meta"]["orig_message"]
    is_event = record.__dict__.get("dagster_event") is not None
    # The engine says this like a step would, of every step after one that failed.
    if is_event or record.msg.startswith("Dependencies for step "):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return True
