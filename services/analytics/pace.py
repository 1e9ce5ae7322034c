"""Who is looked at when. Pure: time is what the caller says it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

#: Two looks at one trial are at least so far apart, and where nothing seems to have happened, so far.
_LEAST_S = 0.5
_IDLE_S = 10.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Open:
    """A trial to look at. One that has stopped is looked at for late outcomes only."""

    revision: int
    running: bool


@dataclass(slots=True)
class _Place:
    """Of one trial: not before `after`, at the latest at `latest`, or once `fresh`."""

    trial: Open
    after: float = float("-inf")
    latest: float = float("-inf")
    fresh: bool = True
    failures: int = 0


class Pace:
    """Looks take about `share` of the time, divided evenly between the trials that run: after a look that
    took t seconds a trial rests for n t / share where n of them run, or for `longest_s`. A trial without new
    data, or one that has stopped, is looked at every ten seconds, one that fails after longer and longer
    rests, which no other trial notices. What was asked anew is looked at at once."""

    def __init__(self, share: float, longest_s: float = math.inf) -> None:
        self._share = share
        self._longest_s = longest_s
        self._places: dict[str, _Place] = {}

    def keep(self, trials: Mapping[str, Open]) -> None:
        """These are the trials there are."""
        for name in [name for name in self._places if name not in trials]:
            del self._places[name]
        for name, trial in trials.items():
            place = self._places.get(name)
            if place is None or place.trial.revision != trial.revision:
                self._places[name] = _Place(trial)

    def wake(self, name: str) -> None:
        """There is something new to see of it."""
        if name in self._places:
            self._places[name].fresh = True

    def next(self, now: float) -> tuple[str | None, float]:
        """Who is next, the one that waits longest, or nobody and how long nobody will be."""
        due = {name: self._due(place) for name, place in self._places.items()}
        if not due:
            return None, _IDLE_S
        name = min(due, key=lambda one: (due[one], one))
        if due[name] <= now:
            self._places[name].fresh = False
            return name, 0.0
        return None, min(_IDLE_S, due[name] - now)

    def looked(self, name: str, now: float, took: float) -> None:
        """A look ended now that took so many seconds of a core."""
        place = self._places.get(name)
        if place is not None:
            place.failures = 0
            place.after = now + max(_LEAST_S, self._rest(took))
            place.latest = max(place.after, now + _IDLE_S)

    def failed(self, name: str, now: float, took: float) -> None:
        """A look ended without a verdict: the trial comes again."""
        place = self._places.get(name)
        if place is not None:
            backoff = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(place.failures, 10))
            place.failures += 1
            place.after = place.latest = now + max(backoff, self._rest(took))

    def _rest(self, took: float) -> float:
        running = sum(place.trial.running for place in self._places.values())
        return min(self._longest_s, took * max(1, running) / self._share)

    @staticmethod
    def _due(place: _Place) -> float:
        return place.after if place.fresh and place.trial.running else place.latest
