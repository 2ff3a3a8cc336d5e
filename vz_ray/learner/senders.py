"""The learner's side of a publish, by transport; see `weights.publisher.Sender`.

shm     rank 0 writes each version to shared memory, and workers pull it
nccl    rank 0 broadcasts to a group of all workers
ipc     rank 0 lends its memory to an engine on the same GPU

With the last two, a copy in shared memory can be kept for workers that are in no group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vz_ray.config.weights import WeightsConfig
from vz_ray.learner.actor import LearnerGroup
from vz_ray.weights.nccl import Roster
from vz_ray.weights.publisher import Receiver, Sender, Update
from vz_ray.weights.verify import Probe


def sender_of(
    group: LearnerGroup, config: WeightsConfig, store: Path, probe: Probe, tensor_parallel: int
) -> Sender:
    """The sender that `config` asks for; `store` is where versions in shared memory lie."""
    bucket_bytes, deadline_s = config.bucket_mib * 2**20, config.deadline_s
    if config.transport == "shm":
        return LearnerSender(group, store, bucket_bytes, probe, deadline_s)
    copies = LearnerSender(group, store, bucket_bytes, None, deadline_s) if config.copies else None
    if config.transport == "ipc":
        return LearnerIpcSender(group, probe, deadline_s, copies)
    return LearnerNcclSender(group, tensor_parallel, probe, deadline_s, copies)


class Copies:
    """The newest version in shared memory, for who cannot be sent it; without `writer` none is kept."""

    def __init__(self, writer: LearnerSender | None) -> None:
        self._writer = writer
        self._kept: Update | None = None

    async def keep(self, update: Update) -> None:
        """Writes the weights that were announced as `update`."""
        if self._writer is not None:
            copy = await self._writer.prepare(update.version)
            self._kept = replace(copy, expected=update.expected)

    def of(self, update: Update) -> Update | None:
        """The copy of that version, if it is the newest."""
        same = self._kept is not None and self._kept.version == update.version
        return self._kept if same else None


class LearnerSender:
    """The learner's side of a publish through shared memory; see `weights.publisher.Sender`."""

    def __init__(
        self, group: LearnerGroup, root: Path, bucket_bytes: int, probe: Probe | None, deadline_s: float
    ) -> None:
        self._group, self._root, self._bucket_bytes, self._probe = group, root, bucket_bytes, probe
        self._deadline_s = deadline_s

    async def prepare(self, version: int) -> Update:
        """Writes the present weights as `version`, and scores the probe with them."""
        what = (version, self._root, self._bucket_bytes, self._probe)
        answers = await self._group.all("write_weights", *what, deadline_s=self._deadline_s)
        update: Update = answers[0]
        return update

    async def connect(self, workers: Sequence[Receiver]) -> None:
        """No group: workers read what `prepare` wrote."""

    async def send(self, update: Update) -> None:
        """Nothing to push."""

    async def abort(self) -> None:
        """Nothing is pushed."""

    async def copy(self, update: Update) -> Update | None:
        """Every version lies where it can be pulled."""
        return update


class LearnerNcclSender:
    """The learner's side of a publish by NCCL; see `weights.publisher.Sender`.

    The group's roster is fixed, so it is opened anew whenever the workers are
    not the ones of the last publish, or the learner was started again. Workers
    that are in no group pull the copies of `copies`, which writes the same
    versions to shared memory. Without it, one that joins between publishes is
    sent the version that was announced last, if the learner still holds it.
    """

    def __init__(
        self,
        group: LearnerGroup,
        tensor_parallel: int,
        probe: Probe | None,
        deadline_s: float,
        copies: LearnerSender | None = None,
    ) -> None:
        self._group, self._tensor_parallel, self._probe = group, tensor_parallel, probe
        self._deadline_s = deadline_s
        self._copies = Copies(copies)
        self._joined: tuple[int, list[str]] | None = None

    async def prepare(self, version: int) -> Update:
        """Announces the present weights as `version`, and scores the probe with them."""
        what = (version, self._probe)
        answers = await self._group.all("announce_weights", *what, deadline_s=self._deadline_s)
        update: Update = answers[0]
        await self._copies.keep(update)
        return update

    async def copy(self, update: Update) -> Update | None:
        """The copy in shared memory of rank 0's node, if copies are kept."""
        return self._copies.of(update)

    async def connect(self, workers: Sequence[Receiver]) -> None:
        """Opens a group of rank 0 and these workers, unless they are the ones that it has."""
        joined = (self._group.life, [worker.name for worker in workers])
        if joined == self._joined or not workers:
            return
        self._joined = None
        address, port = await self._group.address()
        roster = Roster(address, port, len(workers), self._tensor_parallel)
        await asyncio.gather(
            self._group.all("join_engines", roster, deadline_s=self._deadline_s),
            *(worker.init_weights(roster.init_info(index)) for index, worker in enumerate(workers)),
        )
        self._joined = joined

    async def send(self, update: Update) -> None:
        """Broadcasts what was announced."""
        try:
            await self._group.all("begin_send", update.version, deadline_s=self._deadline_s)
            while not all(await self._group.all("sent", deadline_s=self._deadline_s)):
                continue  # each rank waits for its part for a moment
        except BaseException:
            self._joined = None  # a broadcast that broke off leaves the group unusable
            raise

    async def abort(self) -> None:
        """Rank 0 leaves the group, so that a broadcast to it fails."""
        self._joined = None
        await self._group.all("abort_send", deadline_s=self._deadline_s)


class LearnerIpcSender:
    """The learner's side of a publish on one GPU that it shares with the engine."""

    def __init__(
        self,
        group: LearnerGroup,
        probe: Probe | None,
        deadline_s: float,
        copies: LearnerSender | None = None,
    ) -> None:
        self._group, self._probe, self._deadline_s = group, probe, deadline_s
        self._copies = Copies(copies)

    async def prepare(self, version: int) -> Update:
        """Lends the present weights as `version`, and scores the probe with them."""
        answers = await self._group.all("lend_weights", version, self._probe, deadline_s=self._deadline_s)
        update: Update = answers[0]
        await self._copies.keep(update)
        return update

    async def connect(self, workers: Sequence[Receiver]) -> None:
        """No group: the engine reads what was lent."""

    async def send(self, update: Update) -> None:
        """Nothing to push."""

    async def abort(self) -> None:
        """Nothing is pushed."""

    async def copy(self, update: Update) -> Update | None:
        """A joiner must not read what the learner may be changing: it pulls a copy, if copies are kept."""
        return self._copies.of(update)
