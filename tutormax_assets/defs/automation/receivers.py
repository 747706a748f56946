"""Sending a message to every receiver that ``TUTORMAX_ALERTS`` names, through Apprise.

A receiver's URL holds its token, so no URL and no part of one is logged or shown: a receiver is
named by its place in the setting and its scheme.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from tutormax_assets.settings import Settings

RETRIES = 3
"""Further tries after a failed one, of a receiver whose URL does not say ``?retry=``."""

RETRY_DELAY_SECONDS = 2.0
"""Seconds between two tries, of a receiver whose URL does not say ``?wait=``."""

TIMEOUT_SECONDS = 40.0
"""Seconds that a message may take. Dagster ends an evaluation of a sensor after 60."""

# They name the URLs that they call, some of them in full.
_INDISCREET_LOGGERS = ("apprise", "urllib3")


@dataclass(frozen=True)
class Message:
    """What is said to the people on call.

    Attributes:
        title: What happened, in one line.
        body: What failed, where to look and what to do; plain text.
        severity: How receivers mark it.
    """

    title: str
    body: str
    severity: Literal["failure", "warning", "success", "info"]

    def __str__(self) -> str:
        """Title and body as a log shows them, in one line."""
        lines = (line.removeprefix("- ").strip() for line in self.body.splitlines())
        return " | ".join([self.title, *(line for line in lines if line)])


@dataclass(frozen=True)
class Delivery:
    """What became of a message at one receiver.

    Attributes:
        receiver: Place in the setting and scheme, such as ``receiver 2 (slack)``.
        error: Why it did not arrive, without any part of the URL; nothing if it did.
    """

    receiver: str
    error: str | None = None


def receiver_urls(settings: Settings) -> list[str]:
    """The URLs of the receivers; secret."""
    return settings.alerts.get_secret_value().split() if settings.alerts else []


def receiver_names(settings: Settings) -> list[str]:
    """The receivers as they may be shown."""
    return [
        f"receiver {number} ({_scheme(url)})"
        for number, url in enumerate(receiver_urls(settings), start=1)
    ]


def deliver(message: Message, settings: Settings) -> list[Delivery]:
    """Send a message to each receiver, and try again a few times where it does not arrive.

    Returns:
        What became of it, one entry per receiver; none if no receiver is configured.
    """
    urls = receiver_urls(settings)
    if not urls:
        return []
    # Its import, and that of its 180 services with the first URL, takes a second and a half.
    import apprise

    asset = apprise.AppriseAsset(
        app_id="tutormax", default_service_retry=RETRIES, default_service_wait=RETRY_DELAY_SECONDS
    )
    deliveries = [Delivery(name) for name in receiver_names(settings)]
    receivers = apprise.Apprise(asset=asset)
    with _discreet():
        for place, url in enumerate(urls):
            if not receivers.add(url, tag=f"place{place}"):
                deliveries[place] = Delivery(
                    deliveries[place].receiver,
                    "it is no URL that Apprise understands; expected one such as"
                    " slack://token_a/token_b/token_c, mailto://user:password@example.com or"
                    " json://host/path",
                )
        results = receivers.notify(
            message.body,
            title=message.title,
            notify_type=message.severity,
            body_format="text",
            timeout=TIMEOUT_SECONDS,
        )
    for result in results:
        if not result:
            place = int(result.tag[0].removeprefix("place"))
            reasons = [entry.message for entry in result.logs()] or ["it gave no reason"]
            deliveries[place] = Delivery(
                deliveries[place].receiver, _without(urls[place], reasons[-1])
            )
    return deliveries


def send(message: Message, settings: Settings, log: logging.Logger) -> None:
    """Send a message and log what became of it. What cannot be delivered is logged, not raised."""
    deliveries = deliver(message, settings)
    if not deliveries:
        log.info(f"No alert is sent, because TUTORMAX_ALERTS is not set. {message}")
    for delivery in deliveries:
        if delivery.error is None:
            log.info(f"Alert sent to {delivery.receiver}: {message.title}")
        else:
            log.error(
                f"Alert not delivered to {delivery.receiver}: {delivery.error}. It said: {message}"
            )


@contextmanager
def _discreet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _INDISCREET_LOGGERS]
    before = [logger.propagate for logger in loggers]
    silence = logging.NullHandler()
    for logger in loggers:
        logger.propagate = False
        logger.addHandler(silence)
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.removeHandler(silence)


def _scheme(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    return scheme if separator and scheme.isalnum() else "no scheme"


def _without(url: str, text: str) -> str:
    """The text with whatever is in the URL, but for its scheme, made unreadable."""
    _, _, secrets = url.partition("://")
    parts = {part for part in re.split(r"[/:@?&=,+]", secrets) if len(part) > 2}
    for part in sorted(parts | {unquote(part) for part in parts}, key=len, reverse=True):
        text = text.replace(part, "***")
    return text.rstrip(".")
