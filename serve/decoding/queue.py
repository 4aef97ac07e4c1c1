"""Images that wait to be decoded, and whose turn it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from itertools import islice

from mvmr.data.image_bytes import AT_ONCE
from mvmr.serve.decoding.decoder import Job
from mvmr.serve.shares import Recent

BATCH_BYTES = 2**20  # bytes of the images that are handed over at once


class DecodeQueue:
    """Images by client; next is the client whose images have taken least of late. Not for several threads at a time.

    had: seconds of a processor that each client's images have taken of late.
    """

    def __init__(self) -> None:
        self.had = Recent()
        self._jobs: dict[str, deque[Job]] = {}

    def add(self, job: Job, *, first: bool = False) -> None:
        """Let an image wait behind its client's others, or before them."""
        waiting = self._jobs.setdefault(job.client, deque())
        if first:
            waiting.appendleft(job)
        else:
            waiting.append(job)

    def clients(self, *, running: Mapping[str, float], memory: bool) -> list[str]:
        """Those who have an image that could begin, in the order of their turns.

        running: what the images that are being decoded have taken so far, by client
        memory: whether there is memory for a large image
        """

        def turn(client: str) -> tuple[bool, float, bool]:
            return not self._jobs[client][0].urgent, self.had.of(client) + running.get(client, 0.0), client in running

        return sorted((client for client in self._jobs if any(self._ready(client, memory))), key=turn)

    def take(self, idle: int, *, running: Mapping[str, float], memory: bool, busy: Collection[str]) -> list[Job]:
        """The next images for one of so many idle processes: its share of a client's; none where none can begin.

        running, memory: as for `clients`; busy: who gets nothing now.
        """
        clients = self.clients(running=running, memory=memory)
        client = next((client for client in clients if client not in busy), None)
        if client is None:
            return []
        ready = list(islice(self._ready(client, memory), AT_ONCE * idle))
        jobs, size = list[Job](), 0
        for job in ready[: -(-len(ready) // idle)]:
            size += len(job.data)
            if jobs and (job.alone or size > BATCH_BYTES):
                break
            jobs.append(job)
            self._jobs[client].remove(job)
            if job.alone:
                break
        if not self._jobs[client]:
            del self._jobs[client]
        return jobs

    def forget_cancelled(self) -> None:
        """Drop images whose clients have gone, whatever keeps them waiting."""
        for client, waiting in list(self._jobs.items()):
            left = deque(job for job in waiting if not job.answer.cancelled())
            if left:
                self._jobs[client] = left
            else:
                del self._jobs[client]

    def cancel(self) -> None:
        """Cancel all that wait."""
        for waiting in self._jobs.values():
            for job in waiting:
                job.answer.cancel()
        self._jobs.clear()

    def _ready(self, client: str, memory: bool) -> Iterator[Job]:
        return (job for job in self._jobs[client] if not job.answer.cancelled() and (memory or not job.large))
