"""Whether a prompt is worth a hand-off: conditional disaggregation. Pure: measurements in, a decision out.

To prefill n tokens on a decode worker delays each of the B sequences it runs by n c, where c is the time of a token in
a prefill. A hand-off of n tokens delays the one request by a + b n between its first and second token, and what the
decode worker has cached of the prompt and the prefill worker has not, r tokens, is computed a second time. So the
decode worker does it alone if

    n c max(B, 1) <= a + b n + r c

a, b and c are measured on the running cluster: c by the prefill workers, a and b by the least squares line through the
gaps between first and second tokens, less the gap that follows, with older ones forgotten. Until there is an a, nothing
but r speaks against a hand-off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FORGETTING = 0.98
"""Weight of an observation relative to the next: the last 50 count."""
MIN_OBSERVATIONS = 8


@dataclass(slots=True)
class Line:
    """Least squares with exponential forgetting: y = intercept + slope x, both not below 0."""

    _count: int = 0
    _w: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def observe(self, x: float, y: float) -> None:
        self._count += 1
        self._w = FORGETTING * self._w + 1.0
        self._x = FORGETTING * self._x + x
        self._y = FORGETTING * self._y + y
        self._xx = FORGETTING * self._xx + x * x
        self._xy = FORGETTING * self._xy + x * y

    @property
    def known(self) -> bool:
        return self._count >= MIN_OBSERVATIONS

    def fit(self) -> tuple[float, float]:
        """(intercept, slope). With a negative slope or hardly any spread of x the line is flat; with a negative
        intercept it goes through the origin."""
        mean_x, mean_y = self._x / self._w, self._y / self._w
        variance = self._xx / self._w - mean_x**2
        slope = (self._xy / self._w - mean_x * mean_y) / variance if variance > 1e-3 * mean_x**2 else 0.0
        if slope <= 0.0:
            return max(0.0, mean_y), 0.0
        intercept = mean_y - slope * mean_x
        return (intercept, slope) if intercept >= 0.0 else (0.0, max(0.0, self._xy / self._xx))


@dataclass(slots=True)
class BreakEven:
    """`min_tokens` settles it: prompts with fewer tokens to compute are prefilled where they are decoded, others are
    handed over. None measures. Never more than `max_tokens` are computed beside decodes, whatever was measured."""

    min_tokens: int | None = None
    max_tokens: int = 512
    _handoff: Line = field(default_factory=Line)
    _prefill_tokens: float = 0.0
    _prefill_seconds: float = 0.0

    def observe_handoff(self, num_tokens: int, seconds: float) -> None:
        """A hand-off of `num_tokens` made the gap after the first token longer by `seconds`."""
        self._handoff.observe(num_tokens, seconds)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """A prefill worker has computed `num_tokens` in `seconds`."""
        self._prefill_tokens = FORGETTING * self._prefill_tokens + num_tokens
        self._prefill_seconds = FORGETTING * self._prefill_seconds + seconds

    def stays(self, num_tokens: int, num_repeated: int, num_running: int) -> bool:
        """Whether a decode worker that runs `num_running` sequences should compute the `num_tokens` that it has not
        cached itself; `num_repeated` tokens it has cached would be computed again by the prefill worker."""
        if self.min_tokens is not None:
            return num_tokens < self.min_tokens
        if num_tokens > self.max_tokens:
            return False
        fixed, per_token = self._handoff_in_tokens()
        return num_tokens * max(num_running, 1) <= fixed + per_token * num_tokens + num_repeated

    def _handoff_in_tokens(self) -> tuple[float, float]:
        """a / c and b / c."""
        if not self._handoff.known or not self._prefill_seconds:
            return 0.0, 0.0
        seconds_per_token = self._prefill_seconds / self._prefill_tokens
        intercept, slope = self._handoff.fit()
        return intercept / seconds_per_token, slope / seconds_per_token


@dataclass(slots=True)
class FirstGaps:
    """The first gaps between the tokens of a request whose KV (`num_tokens`) is handed over."""

    num_tokens: int
    _times: list[float] = field(default_factory=list)

    def heard(self, count: int, now: float) -> float | None:
        """`count` tokens have come. Once there are three: by how much the first gap was longer than the second, which
        is an ordinary one. Less than nothing if that was the longer one: steps vary, and the mean is to be right."""
        self._times += [now] * count
        if len(self._times) < 3:
            return None
        first, second, third = self._times[:3]
        return (second - first) - (third - second)
