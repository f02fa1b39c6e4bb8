"""A gRPC channel whose connection can be replaced while its user goes on calling.

gRPC cannot change the credentials of a channel. Here the user holds a channel that stays and
passes every call to the connection of the moment: calls that are under way end on the old one,
which is closed after the last of them, and later calls go over the new one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import grpc


class ReplaceableChannel(grpc.Channel):
    """A channel for unary calls that block, which is all that Flower's Fleet API has."""

    def __init__(self, connection: grpc.Channel) -> None:
        """Uses `connection` until another one is given; closes it when its time is over."""
        self._lock = threading.Lock()
        self._connection = connection
        self._calls: dict[grpc.Channel, int] = {}

    def replace(self, connection: grpc.Channel) -> None:
        """Sends later calls over `connection` and closes the old one once it is idle."""
        with self._lock:
            old, self._connection = self._connection, connection
            idle = old not in self._calls
        if idle:
            old.close()

    @contextmanager
    def borrow(self) -> Iterator[grpc.Channel]:
        """The connection of the moment, which stays open until it is given back."""
        with self._lock:
            connection = self._connection
            self._calls[connection] = self._calls.get(connection, 0) + 1
        try:
            yield connection
        finally:
            with self._lock:
                self._calls[connection] -= 1
                idle = not self._calls[connection]
                if idle:
                    del self._calls[connection]
                over = idle and connection is not self._connection
            if over:
                connection.close()

    def unary_unary(self, method: str, *serializers: Any, **named: Any) -> _Call:
        """A call that goes over the connection of the moment, whenever it is made."""
        return _Call(self, lambda connection: connection.unary_unary(method, *serializers, **named))

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False
    ) -> None:
        """Tells the states of the present connection only."""
        self._connection.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """Ends `subscribe`, unless the connection has been replaced."""
        self._connection.unsubscribe(callback)

    def close(self) -> None:
        """Closes the connection, and with it the calls under way."""
        self._connection.close()

    def __enter__(self) -> ReplaceableChannel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _refuse(self, *_arguments: Any, **_named: Any) -> NoReturn:
        raise NotImplementedError("A replaceable channel carries unary calls only.")

    unary_stream = stream_unary = stream_stream = _refuse


class _Call(grpc.UnaryUnaryMultiCallable):  # type: ignore[type-arg]  # generic in stubs only
    """One method of the channel."""

    def __init__(
        self,
        channel: ReplaceableChannel,
        prepare: Callable[[grpc.Channel], grpc.UnaryUnaryMultiCallable[Any, Any]],
    ) -> None:
        self._channel = channel
        self._prepare = prepare

    def __call__(self, request: Any, *arguments: Any, **named: Any) -> Any:
        with self._channel.borrow() as connection:
            return self._prepare(connection)(request, *arguments, **named)

    def with_call(self, request: Any, *arguments: Any, **named: Any) -> tuple[Any, grpc.Call]:
        with self._channel.borrow() as connection:
            return self._prepare(connection).with_call(request, *arguments, **named)

    def future(self, *_arguments: Any, **_named: Any) -> NoReturn:
        raise NotImplementedError("A replaceable channel carries calls that block only.")
