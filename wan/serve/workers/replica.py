"""A model that is kept loaded and makes one video at a time, wherever its processes are."""

from __future__ import annotations

from typing import Protocol

from wan.serve.workers.messages import Event, Order


class ReplicaDied(Exception):
    """The processes of a replica have ended, or cannot be reached. Its text says how."""


class Replica(Protocol):
    """One process, or several that share each video. Used by one thread; only `abort` may come from another."""

    def start(self, order: Order) -> None:
        """Begin a video. Raises `ReplicaDied`."""
        ...

    def poll(self, seconds: float) -> Event | None:
        """What has happened next to the video that was begun; None if nothing has in some seconds.

        The last event is `Made`, `Failed` or `Aborted`. Raises `ReplicaDied`.
        """
        ...

    def abort(self) -> None:
        """Have the video end after the step that runs; `poll` gives `Aborted` then, unless it was at its end."""
        ...

    def close(self) -> None:
        """End its processes, whatever they do."""
        ...


class Engine(Protocol):
    """Where replicas come from."""

    def start_replica(self) -> Replica:
        """A new replica, once its processes are there; models are loaded with the first video.

        Raises `ReplicaDied` if there is no place for one.
        """
        ...

    def wanted(self, waiting: int, running: int) -> int:
        """How many replicas there should be, with some jobs waiting and some running."""
        ...

    def close(self) -> None: ...
