"""What the workers of a replay are used as before anything is replanned."""

from __future__ import annotations

from collections.abc import Iterator

from core.errors import ConfigError
from placement.arranged import Simulated
from placement.arrangement import Arrangement
from placement.native import serve
from placement.predictive import Outlook
from placement.reachable import arrangements
from placement.refusals import reached
from placement.replan_settings import ReplanSettings
from placement.shaped import Shaped
from placement.slo import shown
from placement.traffic import Expected
from placement.worker_shape import devices_of
from placement.workload import Workload

FIRST_REQUESTS = 200
_NO_LOAD = 1e-3
_EXAMPLE = "write --start prefill=1,decode=1, or both=2"


def start_of(
    text: str | None,
    workers: int,
    settings: ReplanSettings,
    predictor: Simulated | Shaped,
    workload: Workload,
    rate: float,
) -> Arrangement:
    """The roles that the text says, or the best for the first requests; steps are always the best for these. Raises
    ConfigError for roles that are not of so many workers, and for targets that no arrangement attains at any rate; then
    it says what is reachable."""
    first = workload.of_length(min(len(workload), FIRST_REQUESTS))
    outlook = Outlook(settings, predictor, Expected(first, rate))
    found = [one for one in _arrangements(workers, settings) if predictor.why_not(one) is None]
    if not found:
        raise ConfigError(_why_none(workers, settings, predictor))
    if text is not None:
        found = _as_asked(text, workers, found)
    _check_reachable(found, settings, predictor, first)
    return max(found, key=lambda one: (outlook.attainment(one), outlook.attainment(one, settings.spare)))


def _arrangements(workers: int, settings: ReplanSettings) -> Iterator[Arrangement]:
    """Of so many workers of the first shape."""
    shape = settings.shapes[0] if settings.shapes else None
    devices = workers * devices_of(shape)
    return arrangements(devices, settings.least_workers, settings.chunk_tokens, (shape,))


def _why_none(workers: int, settings: ReplanSettings, predictor: Simulated | Shaped) -> str:
    if workers < settings.least_workers:
        return f"--workers {workers}: too few for --floor {settings.least_workers}"
    *_, largest = _arrangements(workers, settings)
    return f"--workers {workers}: none of --chunk-tokens can be used: {predictor.why_not(largest)}"


def _as_asked(text: str, workers: int, found: list[Arrangement]) -> list[Arrangement]:
    counts = dict.fromkeys(("prefill", "decode", "both"), 0)
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in counts or not number.isdecimal():
            raise ConfigError(f"--start: {part.strip()!r} is no role and number: {_EXAMPLE}", param="start")
        counts[name] = int(number)
    if sum(counts.values()) != workers:
        raise ConfigError(f"--start: {text} is {sum(counts.values())} in all, and --workers {workers}", param="start")
    asked = [one for one in found if all(getattr(one, name) == count for name, count in counts.items())]
    if not asked:
        raise ConfigError(f"--start: {text} is not either both, or prefill and decode: {_EXAMPLE}", param="start")
    return asked


def _check_reachable(
    found: list[Arrangement], settings: ReplanSettings, predictor: Simulated | Shaped, first: Workload
) -> None:
    targets, share = settings.goal.targets, settings.goal.share
    alone = [serve(predictor.layout(one), first, _NO_LOAD).outcome for one in found]
    best = max(alone, key=lambda outcome: outcome.attainment(targets))
    if best.attainment(targets) >= share:
        return
    wanted = " and ".join(f"{metric}={targets.of(metric):g} ms" for metric in targets.metrics)
    reachable = " and ".join(
        f"{metric.upper()} {shown(reached(best, metric, settings.goal))} ms" for metric in targets.metrics
    )
    raise ConfigError(
        f"{wanted} are out of reach for {share:.0%} of the first {len(first)} requests: without load "
        f"{best.attainment(targets):.0%} attain them, and {share:.0%} have {reachable}",
        param="slo",
    )
