"""What an expert was asked, what it replied and what that cost: on disk, so that nothing is paid for twice.

    asked (at most $) ---> replied (text, tokens, $)
                      |--> refused: cost nothing, by the server's own word
                      `--> neither: may have been charged, so it stays at its most

A line is written before each request and after it. Whatever kills the process,
the next one has every reply that arrived, and counts those that were on their
way at the most that they can have cost: the limit is never passed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vz_ray.data.record import append_lines, to_line, whole_lines


@dataclass(frozen=True, slots=True)
class Reply:
    """One completion.

    Attributes:
        text: What was said; empty where nothing was.
        stop: Why the server says it ended: `stop`, `length`, ...
        prompt_tokens: As the server counted, or an estimate.
        completion_tokens: The same.
        usd: Its cost.
        reported: The server counted.
    """

    text: str
    stop: str
    prompt_tokens: int
    completion_tokens: int
    usd: float
    reported: bool = True


@dataclass(frozen=True, slots=True)
class Spent:
    """Sums over an account.

    Attributes:
        usd: Cost of the replies.
        unsure_usd: Most that requests without a reply can have cost.
        requests: Asked, those without a reply included.
        replies: Received.
        refused: Answered with a status that costs nothing.
        prompt_tokens: Of the replies.
        completion_tokens: Of the replies.
    """

    usd: float = 0.0
    unsure_usd: float = 0.0
    requests: int = 0
    replies: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Account:
    """An account on disk; one process writes it at a time.

    Args:
        path: A file of JSON lines; a half-written last one is cut off.
        limit_usd: Nothing may bring the cost above this; 0 has no limit.

    Attributes:
        spent: So far, by this process and those before it.

    Raises:
        ValueError: `path` has a broken line.
    """

    def __init__(self, path: Path, limit_usd: float = 0.0) -> None:
        self._path, self.limit_usd = path, limit_usd
        self._replies: dict[str, Reply] = {}
        self._open: list[tuple[str, float]] = []
        self._under_way = 0
        self.spent = Spent()
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
            for line in whole_lines(path):
                self._take(line)

    def reply(self, key: str) -> Reply | None:
        """What was replied to this request, if anything was."""
        return self._replies.get(key)

    def allows(self, usd: float) -> bool:
        """Whether a request that may cost `usd` keeps within the limit, whatever those under way cost."""
        return not self.limit_usd or self.spent.usd + self.spent.unsure_usd + usd <= self.limit_usd

    @property
    def may_yet(self) -> bool:
        """Whether requests are under way that may turn out to cost less than what is kept back for them."""
        return self._under_way > 0

    def ask(self, key: str, usd: float) -> None:
        """A request that may cost `usd` is about to be sent."""
        self._under_way += 1
        self._write({"asked": key, "usd": usd})

    def replied(self, key: str, reply: Reply) -> None:
        self._under_way -= 1
        self._write({"replied": key, **asdict(reply)})

    def refuse(self, key: str) -> None:
        """The server refused it: nothing is charged."""
        self._under_way -= 1
        self._write({"refused": key})

    def lose(self) -> None:
        """Nobody knows what became of a request; it stays at its most."""
        self._under_way -= 1

    def _write(self, line: dict[str, Any]) -> None:
        append_lines(self._path, [to_line(line)])
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        now = self.spent
        if "asked" in line:
            self._open.append((line["asked"], line["usd"]))
            self.spent = replace(now, requests=now.requests + 1, unsure_usd=now.unsure_usd + line["usd"])
            return
        key = str(line.get("replied", line.get("refused")))
        # The latest of this name: earlier ones were given up, and stay at their most.
        place = max(i for i, (asked, _) in enumerate(self._open) if asked == key)
        del self._open[place]
        unsure = sum(usd for _, usd in self._open)
        if "refused" in line:
            self.spent = replace(now, refused=now.refused + 1, unsure_usd=unsure)
            return
        reply = self._replies[key] = Reply(**{f.name: line[f.name] for f in fields(Reply)})
        self.spent = replace(
            now,
            usd=now.usd + reply.usd,
            unsure_usd=unsure,
            replies=now.replies + 1,
            prompt_tokens=now.prompt_tokens + reply.prompt_tokens,
            completion_tokens=now.completion_tokens + reply.completion_tokens,
        )
