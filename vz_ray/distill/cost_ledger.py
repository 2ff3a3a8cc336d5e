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

from vz_ray.utils.json_lines import append_lines, read_complete_lines, to_json_line


@dataclass(frozen=True, slots=True)
class TeacherReply:
    """One completion.

    Attributes:
        text: What was said; empty where nothing was.
        finish_reason: Why the server says it ended: `finish_reason`, `length`, ...
        prompt_tokens: As the server counted, or an estimate.
        completion_tokens: The same.
        cost_usd: Its cost.
        usage_reported: The server counted.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    usage_reported: bool = True


@dataclass(frozen=True, slots=True)
class CostSummary:
    """Sums over an account.

    Attributes:
        cost_usd: Cost of the replies.
        reserved_usd: Most that requests without a reply can have cost.
        requests: Asked, those without a reply included.
        replies: Received.
        rejected: Answered with a status that costs nothing.
        prompt_tokens: Of the replies.
        completion_tokens: Of the replies.
    """

    cost_usd: float = 0.0
    reserved_usd: float = 0.0
    requests: int = 0
    replies: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class CostLedger:
    """An account on disk; one process writes it at a time.

    Args:
        path: A file of JSON lines; a half-written last one is cut off.
        budget_usd: Nothing may bring the cost above this; 0 has no limit.

    Attributes:
        totals: So far, by this process and those before it.

    Raises:
        ValueError: `path` has a broken line.
    """

    def __init__(self, path: Path, budget_usd: float = 0.0) -> None:
        self._path, self.budget_usd = path, budget_usd
        self._replies: dict[str, TeacherReply] = {}
        self._open: list[tuple[str, float]] = []
        self._under_way = 0
        self.totals = CostSummary()
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
            for line in read_complete_lines(path):
                self._take(line)

    def get_reply(self, key: str) -> TeacherReply | None:
        """What was replied to this request, if anything was."""
        return self._replies.get(key)

    def can_afford(self, usd: float) -> bool:
        """Whether a request that may cost `usd` keeps within the limit, whatever those under way cost."""
        return not self.budget_usd or self.totals.cost_usd + self.totals.reserved_usd + usd <= self.budget_usd

    @property
    def has_pending_requests(self) -> bool:
        """Whether requests are under way that may turn out to cost less than what is kept back for them."""
        return self._under_way > 0

    def reserve(self, key: str, usd: float) -> None:
        """A request that may cost `usd` is about to be sent."""
        self._under_way += 1
        self._write({"asked": key, "usd": usd})

    def record_reply(self, key: str, reply: TeacherReply) -> None:
        self._under_way -= 1
        self._write({"record_reply": key, **asdict(reply)})

    def record_rejection(self, key: str) -> None:
        """The server refused it: nothing is charged."""
        self._under_way -= 1
        self._write({"refused": key})

    def record_lost(self) -> None:
        """Nobody knows what became of a request; it stays at its most."""
        self._under_way -= 1

    def _write(self, line: dict[str, Any]) -> None:
        append_lines(self._path, [to_json_line(line)])
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        now = self.totals
        if "asked" in line:
            self._open.append((line["asked"], line["usd"]))
            self.totals = replace(now, requests=now.requests + 1, reserved_usd=now.reserved_usd + line["usd"])
            return
        key = str(line.get("record_reply", line.get("refused")))
        # The latest of this name: earlier ones were given up, and stay at their most.
        place = max(i for i, (asked, _) in enumerate(self._open) if asked == key)
        del self._open[place]
        unsure = sum(usd for _, usd in self._open)
        if "refused" in line:
            self.totals = replace(now, rejected=now.rejected + 1, reserved_usd=unsure)
            return
        reply = self._replies[key] = TeacherReply(**{f.name: line[f.name] for f in fields(TeacherReply)})
        self.totals = replace(
            now,
            cost_usd=now.cost_usd + reply.cost_usd,
            reserved_usd=unsure,
            replies=now.replies + 1,
            prompt_tokens=now.prompt_tokens + reply.prompt_tokens,
            completion_tokens=now.completion_tokens + reply.completion_tokens,
        )
