"""Connections of clients that say too little."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# What the head of a request may take to come, from when a connection is there or the answer before it was sent.
HEAD_SECONDS = 20.0


class HastyProtocol(H11Protocol):
    """uvicorn's protocol, which ends connections of whose next request the head does not come: it waits for ever."""

    _impatience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._impatience is not None:
            self._impatience.cancel()

    def _wait(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
        if not self.transport.is_closing():
            self._impatience = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        # Looked at only here, for a request that was sent together with the one before comes by no call of its own.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
