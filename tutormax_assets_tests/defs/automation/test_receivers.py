"""Delivery of messages to real receivers on this machine, and that their URLs stay secret."""

import logging

import pytest

from tutormax_assets.defs.automation.receivers import (
    RETRIES,
    Delivery,
    Message,
    deliver,
    receiver_names,
    send,
)
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.settings import load_settings
from tutormax_assets_tests.conftest import captured_log
from tutormax_assets_tests.defs.automation.conftest import TOKEN, MailServer, WebhookServer

MESSAGE = Message("tutormax: a title", "What failed:\n- step a_b. <none> & *all*", "failure")
NOWHERE = f"json://reader:{TOKEN}@127.0.0.1:1/{TOKEN}?retry=1&wait=0"


def test_a_webhook_gets_title_body_and_severity(webhook: WebhookServer) -> None:
    assert deliver(MESSAGE, load_settings()) == [Delivery("receiver 1 (json)")]

    [request] = webhook.requests
    assert (request["title"], request["message"]) == (MESSAGE.title, MESSAGE.body)
    assert request["type"] == "failure"


def test_a_mail_gets_title_and_body(
    mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_ALERTS", mail_server.url)

    assert deliver(MESSAGE, load_settings()) == [Delivery("receiver 1 (mailto)")]

    [mail] = mail_server.mails
    assert mail["Subject"] == MESSAGE.title
    assert "oncall@example.com" in mail["To"]
    assert "tutormax@example.com" in mail["From"]
    assert mail.get_content_type() == "text/plain"
    assert mail.get_content().splitlines() == MESSAGE.body.splitlines()


def test_one_receiver_that_is_down_does_not_keep_others_from_it(
    webhook: WebhookServer, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [NOWHERE, webhook.url, f"slak://{TOKEN}", mail_server.url]
    monkeypatch.setenv("TUTORMAX_ALERTS", "  ".join(urls))

    down, posted, unknown, mailed = deliver(MESSAGE, load_settings())

    assert down == Delivery(
        "receiver 1 (json)", "A Connection error occurred sending JSON notification to ***"
    )
    assert (posted.error, mailed.error) == (None, None)
    assert (len(webhook.requests), len(mail_server.mails)) == (1, 1)
    assert unknown.receiver == "receiver 3 (slak)"
    assert str(unknown.error).startswith("it is no URL that Apprise understands; expected one such")


def test_a_receiver_that_refuses_is_tried_a_few_times(
    webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_ALERTS", f"{webhook.url}?wait=0")
    webhook.answer = 503

    [delivery] = deliver(MESSAGE, load_settings())

    assert "503" in str(delivery.error)
    assert webhook.titles == [MESSAGE.title] * (1 + RETRIES)


def test_nothing_configured_leaves_it_to_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTORMAX_ALERTS", "")
    settings = load_settings()

    with captured_log() as log:
        send(MESSAGE, settings, logging.getLogger(LOGGER))

    assert deliver(MESSAGE, settings) == []
    assert log == [f"INFO No alert is sent, because TUTORMAX_ALERTS is not set. {MESSAGE}"]


def test_what_became_of_it_is_in_the_log_and_no_secret_is(
    webhook: WebhookServer,
    mail_server: MailServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    webhook.answer = 500
    urls = [
        f"{webhook.url}?retry=0",
        mail_server.url,
        NOWHERE,
        f"slak://{TOKEN}",
        f"slack://T1JJ3T3L2/A1BRTD4JD/{TOKEN}?retry=0&cto=0.1",
    ]
    monkeypatch.setenv("TUTORMAX_ALERTS", " ".join(urls))
    # No network.
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    settings = load_settings()

    with caplog.at_level(logging.DEBUG):
        send(MESSAGE, settings, logging.getLogger(LOGGER))

    mine = [record for record in caplog.records if record.name == LOGGER]
    assert [record.levelname for record in mine] == ["ERROR", "INFO"] + ["ERROR"] * 3
    assert mine[1].getMessage() == "Alert sent to receiver 2 (mailto): tutormax: a title"
    assert mine[0].getMessage().startswith("Alert not delivered to receiver 1 (json): ")
    # It is not lost.
    assert mine[0].getMessage().endswith(f" It said: {MESSAGE}")
    shown = "\n".join(record.getMessage() for record in caplog.records)
    shown += "".join(capfd.readouterr()) + repr(settings) + str(receiver_names(settings))
    for secret in (TOKEN, "T1JJ3T3L2", "A1BRTD4JD"):
        assert secret not in shown
