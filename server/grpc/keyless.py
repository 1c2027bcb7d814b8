"""The methods that need no key, health and reflection: what they receive is bounded as well."""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from typing import Any

import grpc

from server.grpc.receiving import ReceivingSlots, Slot

EOF = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
# Their messages are tiny, but nobody keeps a client from sending others.
_RECEIVING_CALLS = 4

Handler = Any  # a grpc.RpcMethodHandler, whose stubs are generic and which is not
Context = grpc.aio.ServicerContext[Any, Any]


class KeylessHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # as above
    """Serves the methods that generated code adds to it, as it would add them to a server."""

    def __init__(self) -> None:
        self._handlers: list[Any] = []
        self._slots = ReceivingSlots(_RECEIVING_CALLS)

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """Take the handlers of a service."""
        self._handlers += handlers

    def add_registered_method_handlers(self, _service: str, _of: Mapping[str, Handler]) -> None:
        """Ignore the same handlers in another form."""

    def service(self, details: grpc.HandlerCallDetails) -> Handler:
        """Return what serves a method; it reads messages only while it has a slot."""
        found = (handler.service(details) for handler in self._handlers)
        handler = next((each for each in found if each is not None), None)
        return None if handler is None else self._bound(handler)

    def _bound(self, handler: Handler) -> Handler:
        serializers = (handler.request_deserializer, handler.response_serializer)
        if not handler.response_streaming:

            async def answer(_messages: object, context: Context) -> Any:
                return await handler.unary_unary(await self._read(context), context)

            return grpc.stream_unary_rpc_method_handler(answer, *serializers)
        if not handler.request_streaming:

            async def write(_messages: object, context: Context) -> None:
                await handler.unary_stream(await self._read(context), context)

            return grpc.stream_stream_rpc_method_handler(write, *serializers)

        async def converse(_messages: object, context: Context) -> AsyncIterator[Any]:
            async for response in handler.stream_stream(self._read_all(context), context):
                yield response

        return grpc.stream_stream_rpc_method_handler(converse, *serializers)

    async def _read(self, context: Context) -> Any:
        message = await self._receive(context)
        if message is EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request: missing")
        return message

    async def _read_all(self, context: Context) -> AsyncIterator[Any]:
        while (message := await self._receive(context)) is not EOF:
            yield message

    async def _receive(self, context: Context) -> Any:
        async def end_call() -> None:
            with suppress(grpc.aio.AbortError):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not received in time")

        slot = Slot(context.peer(), end_call)
        try:
            await self._slots.take(slot)
            return await context.read()
        finally:
            self._slots.release(slot)
