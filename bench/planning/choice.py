"""Which layouts of a plan are run, and at which rates: the chosen one and some that it was preferred to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.errors import ConfigError
from placement.candidates import Candidate, Space, candidates
from placement.layout import Role
from placement.plan import Made

REJECTED = 3
SHARES = (0.3, 0.6, 0.85)
"""Of the goodput that is predicted of the chosen layout."""


def choose(made: Made, space: Callable[[frozenset[Role]], Space], names: Sequence[str]) -> list[Candidate]:
    """Those of these names; without names the chosen one and the REJECTED next. Raises ConfigError for a name that no
    layout has."""
    if not names:
        return made.candidates[: 1 + REJECTED]
    known = {candidate.name: candidate for candidate in candidates(space(frozenset(Role)))}
    known |= {candidate.name: candidate for candidate in made.candidates}
    if unknown := [name for name in names if name not in known]:
        listed = "\n  ".join(sorted(known))
        raise ConfigError(f"--layout: there is no {unknown[0]!r}; there are\n  {listed}", param="layout")
    return [known[name] for name in dict.fromkeys(names)]


def rates_of(given: str | None, goodput: float) -> list[float]:
    """ "0.5,1,2" requests/s, ascending; without them SHARES of `goodput`. Raises ConfigError."""
    if given is None:
        return [share * goodput for share in SHARES]
    try:
        rates = sorted({float(part) for part in given.split(",")})
    except ValueError as error:
        raise ConfigError(f"--rates: {given!r} is not a list of requests/s, such as 0.5,1,2", param="rates") from error
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"--rates: {given!r}: every rate is above 0", param="rates")
    return rates
