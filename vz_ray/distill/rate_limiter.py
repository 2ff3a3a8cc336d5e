"""Rate limiter for requests and tokens. The caller passes the time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 60.0


@dataclass
class SentRequest:
    """Time and token count of a sent request."""

    sent_at_s: float
    tokens: int


class RateLimiter:
    """Sliding-window limit of requests and tokens in any 60 seconds; 0 means unlimited.

    Example:
        >>> limiter = RateLimiter(requests_per_minute=1, tokens_per_minute=0)
        >>> limiter.record_request(now_s=10.0, tokens=500)
        SentRequest(sent_at_s=10.0, tokens=500)
        >>> limiter.wait_time_s(now_s=30.0, tokens=500)
        40.0
    """

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self._max_requests, self._max_tokens = requests_per_minute, tokens_per_minute
        self._sent: deque[SentRequest] = deque()

    def wait_time_s(self, now_s: float, tokens: int) -> float:
        """Return the seconds until a request of `tokens` may be sent.

        A request above the token limit is allowed once the window is empty.
        """
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
        """Record a sent request. The caller may correct `tokens` of the returned entry later."""
        sent = SentRequest(now_s, tokens)
        self._sent.append(sent)
        return sent

    def _fits(self, count: int, total: int, tokens: int) -> bool:
        requests_fit = not self._max_requests or count < self._max_requests
        return requests_fit and (not self._max_tokens or total + tokens <= self._max_tokens)
