"""Answers: a SuperNode looks for the next message only once the one that it has is answered.

Flower 1.39 stores a message before it asks whether its run still goes on. Where the run is stopped
in between, it forgets the message but its ClientApp answers all the same; that answer is then
taken for the next message's, whose own waits for the one after: from then on every reply comes a
message late, which is too late for its run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Answers:
    """Keeps Flower's loop at a message until the reply to that very message has been sent."""

    def __init__(self) -> None:
        """Nothing has been received yet."""
        self._received = ""
        self._sent: set[str] = set()

    def install(self) -> None:
        """Make Flower's loop receive and send through here.

        The loop has no setting, but it calls both steps by its module's own names.
        """
        from flwr.supernode import start_client_internal

        names = vars(start_client_internal)
        names["_pull_and_store_message"] = self._receive(names["_pull_and_store_message"])
        names["_push_messages"] = self._send(names["_push_messages"])

    def _receive(self, pull: Callable[..., int | None]) -> Callable[..., int | None]:
        """Flower's own step, with a note of which message came."""

        def receive(**arguments: Any) -> int | None:
            ask = arguments.pop("receive")

            def noted() -> Any:
                found = ask()
                if found is not None:
                    self._received = found[0].metadata.message_id
                return found

            return pull(receive=noted, **arguments)

        return receive

    def _send(self, push: Callable[..., None]) -> Callable[..., None]:
        """Flower's own step, again until the reply to the message at hand was among those sent."""

        def send(**arguments: Any) -> None:
            transmit = arguments.pop("send")

            def noted(message: Any, *rest: Any) -> Any:
                self._sent.add(message.metadata.reply_to_message_id)
                return transmit(message, *rest)

            self._sent.clear()
            while self._received not in self._sent:
                push(send=noted, **arguments)

        return send
