"""The live stream of one model version: first it teaches the reference, then panes of it are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from services.drift.draw import Draw, Seen, drawn
from services.drift.evaluation import FeatureReport, Profile, Thresholds, evaluate
from services.drift.sample import Sample


@dataclass(frozen=True, slots=True)
class Cadence:
    """How many rows make a reference, a pane, and how many panes a sliding window."""

    reference_rows: int = 500
    pane_rows: int = 250
    window_panes: int = 2
    #: Shortest time between two comparisons, seconds: under load panes grow instead of following faster.
    pane_s: float = 0.0
    #: Rows of a pane that are looked at, at most, but never fewer than `pane_rows`; 0: every row.
    sample_rows: int = 0

    @property
    def looked_at(self) -> int:
        """How many rows of a pane are looked at, at most; 0: every row."""
        return max(self.sample_rows, self.pane_rows) if self.sample_rows else 0


@dataclass(frozen=True, slots=True)
class Window:
    """The last panes of a stream, compared with its reference. Times are Unix microseconds. Of `rows` rows
    `sampled_rows`, uniformly chosen, were looked at: every number of the reports is about these."""

    start_us: int
    end_us: int
    rows: int
    sampled_rows: int
    reference_rows: int
    reports: list[FeatureReport]


@dataclass(slots=True)
class Stream:
    """What is kept of one model version. `panes` are the closed ones, oldest first."""

    reference: Sample | None = None
    learning: Sample = field(default_factory=Sample)
    pane: Draw = field(default_factory=Draw)
    panes: list[Draw] = field(default_factory=list)
    _profile: Profile | None = None

    def feed(self, seen: Iterable[Seen], cadence: Cadence, thresholds: Thresholds) -> list[Window]:
        """Add what was seen, in order; gives the windows that became full.

        Until there is a reference, rows go to it, every one: those that complete it are not compared with it.
        """
        windows = []
        for rows in seen:
            begun = 0
            while begun < rows.rows:
                left = rows.rows - begun
                if self.reference is None:
                    taken = min(left, max(1, cadence.reference_rows - self.learning.rows))
                    self.learning.add(rows.take(np.arange(begun, begun + taken)), rows.at_us)
                    if self.learning.rows >= cadence.reference_rows:
                        self.reference, self.learning, self._profile = self.learning, Sample(), None
                else:
                    wanted = cadence.pane_rows - self.pane.rows
                    taken = wanted if 0 < wanted < left else left
                    self.pane.add(rows, begun, taken, cadence.looked_at)
                    if self._is_full(cadence):
                        windows.append(self._close_pane(self.reference, cadence, thresholds))
                begun += taken
        return windows

    def _is_full(self, cadence: Cadence) -> bool:
        begun_us = self.pane.first_us
        if self.panes:
            # A clock that was ahead has ended the last pane in times to come: none would be full until then.
            begun_us = min(begun_us, self.panes[-1].last_us)
        lasted_us = self.pane.last_us - begun_us
        return self.pane.rows >= cadence.pane_rows and lasted_us >= cadence.pane_s * 1e6

    def _close_pane(self, reference: Sample, cadence: Cadence, thresholds: Thresholds) -> Window:
        """End the open pane and compare the window that it completes."""
        self.panes = [*self.panes, self.pane][-cadence.window_panes :]
        self.pane = Draw()
        window = drawn(self.panes)
        if self._profile is None:
            self._profile = Profile.of(reference, thresholds.bins)
        reports = evaluate(self._profile, window, thresholds)
        return Window(
            start_us=self.panes[0].first_us,
            end_us=self.panes[-1].last_us,
            rows=sum(pane.rows for pane in self.panes),
            sampled_rows=window.rows,
            reference_rows=reference.rows,
            reports=reports,
        )

    def replace_reference(self, reference: Sample | None) -> None:
        """Compare with `reference` from now on, or learn a new one. Earlier panes say nothing about it."""
        self.reference, self.learning, self.pane, self.panes = reference, Sample(), Draw(), []
        self._profile = None
