"""``tutormax alert``: where alerts go, and whether a test message arrives there."""

from typing import Annotated

import typer

from tutormax_assets.cli.terminal import EXIT_FAILED, EXIT_USAGE, fail, sentences, settings, show


def alert(
    test: Annotated[bool, typer.Option("--test", help="Send a test message to each.")] = False,
) -> None:
    """Show where alerts go; with --test, send a message there and say whether it arrived.

    Exit code: 0 it arrived everywhere, 1 somewhere it did not, 2 TUTORMAX_ALERTS is not set.
    """
    environment = settings()
    with sentences():
        from tutormax_assets.defs.automation.receivers import Message, deliver, receiver_names

        names = receiver_names(environment)
        if not names:
            fail(
                "TUTORMAX_ALERTS is not set, so alerts are in the log only; expected one or more"
                " Apprise URLs separated by spaces, such as slack://token_a/token_b/token_c.",
                code=EXIT_USAGE,
            )
        if not test:
            for name in names:
                show(name)
            return
        deliveries = deliver(
            Message(
                "tutormax: test of the alerts",
                "This is what an alert looks like. Nothing happened, and nothing is to be done.\n\n"
                f"Links in alerts lead to {environment.ui_url}",
                "info",
            ),
            environment,
        )
    for delivery in deliveries:
        show(f"{delivery.receiver}: {delivery.error or 'arrived'}")
    if any(delivery.error for delivery in deliveries):
        raise typer.Exit(EXIT_FAILED)
