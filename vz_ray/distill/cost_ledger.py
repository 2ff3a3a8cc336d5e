"""Ledger of teacher requests, replies and costs on disk. A reply is never paid for twice.

    reserved (maximum $) ---> reply (text, tokens, $)
                         |--> rejected: not charged, according to the server
                         `--> no line: possibly charged, so the reservation stays

One line is written before each request and one after it. After a crash, the next process finds every received
reply and counts requests without a reply at their maximum cost. The budget is therefore never exceeded.
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
        text: Generated text; may be empty.
        finish_reason: Finish reason of the server: `stop`, `length`, ...
        prompt_tokens: Prompt tokens, counted by the server or estimated.
        completion_tokens: Completion tokens, counted by the server or estimated.
        cost_usd: Cost of the request.
        usage_reported: Whether the server reported the token counts.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    usage_reported: bool = True


@dataclass(frozen=True, slots=True)
class CostSummary:
    """Totals of a ledger.

    Attributes:
        cost_usd: Cost of the replies.
        reserved_usd: Maximum cost of the requests without a reply.
        requests: Requests, including those without a reply.
        replies: Received replies.
        rejected: Requests that the server rejected without a charge.
        prompt_tokens: Prompt tokens of the replies.
        completion_tokens: Completion tokens of the replies.
    """

    cost_usd: float = 0.0
    reserved_usd: float = 0.0
    requests: int = 0
    replies: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class CostLedger:
    """Append-only ledger file with a single writer process.

    Args:
        path: JSON lines file. A partial last line is truncated.
        max_cost_usd: Budget; 0 means unlimited.

    Attributes:
        totals: Totals of this process and all earlier ones.

    Raises:
        ValueError: `path` contains an invalid line.
    """

    def __init__(self, path: Path, max_cost_usd: float = 0.0) -> None:
        self._path, self.max_cost_usd = path, max_cost_usd
        self._replies: dict[str, TeacherReply] = {}
        self._reservations: list[tuple[str, float]] = []
        self._num_pending = 0
        self.totals = CostSummary()
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
            for line in read_complete_lines(path):
                self._apply(line)

    def get_reply(self, key: str) -> TeacherReply | None:
        """Return the recorded reply to request `key`, if any."""
        return self._replies.get(key)

    def can_afford(self, usd: float) -> bool:
        """Return whether `usd` fits the budget if all pending requests cost their maximum."""
        committed_usd = self.totals.cost_usd + self.totals.reserved_usd
        return not self.max_cost_usd or committed_usd + usd <= self.max_cost_usd

    @property
    def has_pending_requests(self) -> bool:
        """Whether requests of this process are pending, which may release a part of their reservation."""
        return self._num_pending > 0

    def reserve(self, key: str, usd: float) -> None:
        """Reserve the maximum cost of a request before it is sent."""
        self._num_pending += 1
        self._write({"reserved": key, "usd": usd})

    def record_reply(self, key: str, reply: TeacherReply) -> None:
        """Replace the reservation by the cost of the reply."""
        self._num_pending -= 1
        self._write({"replied": key, **asdict(reply)})

    def record_rejection(self, key: str) -> None:
        """Release the reservation of a request that the server rejected."""
        self._num_pending -= 1
        self._write({"rejected": key})

    def record_lost(self) -> None:
        """Mark a request as finished without a known outcome. Its reservation stays."""
        self._num_pending -= 1

    def _write(self, line: dict[str, Any]) -> None:
        append_lines(self._path, [to_json_line(line)])
        self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        totals = self.totals
        if "reserved" in line:
            self._reservations.append((line["reserved"], line["usd"]))
            reserved_usd = totals.reserved_usd + line["usd"]
            self.totals = replace(totals, requests=totals.requests + 1, reserved_usd=reserved_usd)
            return
        key = str(line.get("replied", line.get("rejected")))
        # Release the latest reservation of this key; earlier ones belong to lost attempts.
        index = max(i for i, (reserved_key, _) in enumerate(self._reservations) if reserved_key == key)
        del self._reservations[index]
        reserved_usd = sum(usd for _, usd in self._reservations)
        if "rejected" in line:
            self.totals = replace(totals, rejected=totals.rejected + 1, reserved_usd=reserved_usd)
            return
        reply = self._replies[key] = TeacherReply(**{f.name: line[f.name] for f in fields(TeacherReply)})
        self.totals = replace(
            totals,
            cost_usd=totals.cost_usd + reply.cost_usd,
            reserved_usd=reserved_usd,
            replies=totals.replies + 1,
            prompt_tokens=totals.prompt_tokens + reply.prompt_tokens,
            completion_tokens=totals.completion_tokens + reply.completion_tokens,
        )
