"""How soon the next request may go out. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 60.0


@dataclass
class SentRequest:
    """A request that went out: when, and how many tokens it takes."""

    sent_at_s: float
    tokens: int


class RateLimiter:
    """At most so many requests, and so many tokens, in any 60 seconds; 0 has no limit.

    Example:
        >>> pace = Pace(requests=1, tokens=0)
        >>> pace.send(at_s=10.0, tokens=500)
        >>> pace.wait_s(at_s=30.0, tokens=500)
        40.0
    """

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self._requests, self._tokens = requests_per_minute, tokens_per_minute
        self._sent: deque[SentRequest] = deque()

    def wait_time_s(self, now_s: float, tokens: int) -> float:
        """Seconds until a request of `tokens` may go out; one above the limit goes out alone."""
        while self._sent and self._sent[0].sent_at_s <= now_s - WINDOW_S:
            self._sent.popleft()
        count, total = len(self._sent), sum(sent.tokens for sent in self._sent)
        for sent in self._sent:
            if self._fits(count, total, tokens):
                break
            count, total, free_at_s = count - 1, total - sent.tokens, sent.sent_at_s + WINDOW_S
            if self._fits(count, total, tokens) or not count:
                return free_at_s - now_s
        return 0.0

    def record_request(self, now_s: float, tokens: int) -> SentRequest:
        """A request goes out; `tokens` of what it returns may be set right once they are known."""
        sent = SentRequest(now_s, tokens)
        self._sent.append(sent)
        return sent

    def _fits(self, count: int, total: int, tokens: int) -> bool:
        few = not self._requests or count < self._requests
        return few and (not self._tokens or total + tokens <= self._tokens)
