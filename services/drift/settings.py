"""What the drift service reads from its environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.common.settings import DatabaseSettings, Port, ServiceSettings
from services.drift.alerting import Persistence
from services.drift.consumers import Limits
from services.drift.evaluation import Thresholds
from services.drift.stream import Cadence

Count = Annotated[int, Field(ge=1)]


class Settings(ServiceSettings, DatabaseSettings):
    """Ports, and how eager the watch is."""

    http_port: Port = 8050
    #: Predictions that make the reference of a version where none was uploaded.
    drift_reference_rows: Annotated[int, Field(ge=50)] = 500
    #: Rows between two comparisons, and how many such panes a window slides over.
    drift_pane_rows: Annotated[int, Field(ge=50)] = 250
    drift_window_panes: Count = 2
    drift_pane_s: Annotated[float, Field(ge=0)] = 1.0
    #: Rows of a pane that are looked at, at most, uniformly chosen from all and at least `drift_pane_rows`;
    #: 0: every row. Beyond some thousands more rows cost only time: how large a shift must be to matter is
    #: many times what they still blur.
    drift_sample_rows: Annotated[int, Field(ge=0, le=100_000)] = 2_000
    drift_psi_warning: Annotated[float, Field(gt=0)] = 0.1
    drift_psi_critical: Annotated[float, Field(gt=0)] = 0.2
    #: Windows in a row before an alert opens, and calm ones before it ends. One pane lies in as many windows
    #: in a row as a window has panes: with one more than that, no single pane can open an alert.
    drift_alert_after: Count = 3
    drift_resolve_after: Count = 3

    def limits(self) -> Limits:
        """The same as the service's own terms."""
        return Limits(
            Cadence(
                self.drift_reference_rows,
                self.drift_pane_rows,
                self.drift_window_panes,
                self.drift_pane_s,
                self.drift_sample_rows,
            ),
            Thresholds(psi_warning=self.drift_psi_warning, psi_critical=self.drift_psi_critical),
            Persistence(self.drift_alert_after, self.drift_resolve_after),
        )
