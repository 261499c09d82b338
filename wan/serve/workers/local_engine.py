"""The engine of one machine: a single process that makes videos."""

from __future__ import annotations

from collections.abc import Callable

from wan.serve.workers.process import MakesVideos, ProcessReplica


class LocalEngine:
    """An `Engine` of one replica, which is always there. make_maker: as of `ProcessReplica`"""

    def __init__(self, make_maker: Callable[[], MakesVideos]):
        self.make_maker = make_maker

    def start_replica(self) -> ProcessReplica:
        return ProcessReplica(self.make_maker)

    def wanted(self, waiting: int, running: int) -> int:
        return 1

    def close(self) -> None:
        """Nothing is left once its replica is closed."""
