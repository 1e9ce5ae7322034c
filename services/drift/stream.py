"""The live stream of one model version: first it teaches the reference, then panes of it are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.drift.evaluation import FeatureReport, Profile, Thresholds, evaluate
from services.drift.observations import Observations
from services.drift.sample import Sample, merged


@dataclass(frozen=True, slots=True)
class Cadence:
    """How many rows make a reference, a pane, and how many panes a sliding window."""

    reference_rows: int = 500
    pane_rows: int = 250
    window_panes: int = 2
    #: Shortest time between two comparisons, seconds: under load panes grow instead of following faster.
    pane_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """The last panes of a stream, compared with its reference. Times are Unix microseconds."""

    start_us: int
    end_us: int
    rows: int
    reference_rows: int
    reports: list[FeatureReport]


@dataclass(slots=True)
class Stream:
    """What is kept of one model version. `panes` are the closed ones, oldest first."""

    reference: Sample | None = None
    learning: Sample = field(default_factory=Sample)
    pane: Sample = field(default_factory=Sample)
    panes: list[Sample] = field(default_factory=list)
    _profile: Profile | None = None

    def feed(
        self, seen: Iterable[tuple[Observations, int]], cadence: Cadence, thresholds: Thresholds
    ) -> list[Window]:
        """Add observations with the time they were answered, in order; gives the windows that became full.

        Until there is a reference, rows go to it: the rows that complete it are not compared with it.
        """
        windows = []
        for observations, at_us in seen:
            begun = 0
            while begun < observations.rows:
                if self.reference is None:
                    part = observations.part(begun, cadence.reference_rows - self.learning.rows)
                    self.learning.add(part, at_us)
                    if self.learning.rows >= cadence.reference_rows:
                        self.reference, self.learning, self._profile = self.learning, Sample(), None
                else:
                    part = observations.part(begun, cadence.pane_rows - self.pane.rows)
                    self.pane.add(part, at_us)
                    if self._is_full(cadence):
                        windows.append(self._close_pane(self.reference, cadence, thresholds))
                begun += part.rows
        return windows

    def _is_full(self, cadence: Cadence) -> bool:
        lasted_us = self.pane.last_us - (self.panes[-1].last_us if self.panes else self.pane.first_us)
        return self.pane.rows >= cadence.pane_rows and lasted_us >= cadence.pane_s * 1e6

    def _close_pane(self, reference: Sample, cadence: Cadence, thresholds: Thresholds) -> Window:
        """End the open pane and compare the window that it completes."""
        self.panes = [*self.panes, self.pane][-cadence.window_panes :]
        self.pane = Sample()
        window = merged(self.panes)
        if self._profile is None:
            self._profile = Profile.of(reference, thresholds.bins)
        reports = evaluate(self._profile, window, thresholds)
        return Window(window.first_us, window.last_us, window.rows, reference.rows, reports)

    def replace_reference(self, reference: Sample | None) -> None:
        """Compare with `reference` from now on, or learn a new one. Earlier panes say nothing about it."""
        self.reference, self.learning, self.pane, self.panes = reference, Sample(), Sample(), []
        self._profile = None
