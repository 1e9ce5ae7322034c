"""What the analytics service reads from its environment."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from services.analytics.flushing import Retention, Sizes
from services.common.settings import ArtifactSettings, DatabaseSettings, Port, ServiceSettings


class Settings(ServiceSettings, DatabaseSettings, ArtifactSettings):
    """Ports, and how large the pieces of the prediction store are."""

    http_port: Port = 8040
    #: A delivery with at least so many requests becomes Parquet at once, a smaller one waits in the inbox.
    analytics_direct_rows: Annotated[int, Field(ge=1)] = 2_000
    #: The inbox of a version becomes Parquet at so many requests, or at that age.
    analytics_flush_rows: Annotated[int, Field(ge=1)] = 5_000
    analytics_flush_after_s: Annotated[float, Field(gt=0)] = 10.0
    #: Segments below that size are joined once there are so many of them.
    analytics_segment_rows: Annotated[int, Field(ge=1)] = 200_000
    analytics_join_segments: Annotated[int, Field(ge=2)] = 8
    #: Predictions go after so many days, and the oldest before that where they take more bytes; outcomes go
    #: so many days after they came.
    analytics_keep_days: Annotated[float, Field(gt=0, le=36_500)] = 90.0
    analytics_keep_bytes: Annotated[int, Field(ge=1)] = 1 << 40
    analytics_keep_outcomes_days: Annotated[float, Field(gt=0, le=36_500)] = 90.0
    #: Share of one core that goes into looks at experiments and rollouts, and into the placebos beside them.
    analytics_looks_share: Annotated[float, Field(gt=0, le=1)] = 0.08
    analytics_placebo_share: Annotated[float, Field(gt=0, le=1)] = 0.02

    def sizes(self) -> Sizes:
        """The same as the service's own terms."""
        return Sizes(
            direct_rows=self.analytics_direct_rows,
            flush_rows=self.analytics_flush_rows,
            flush_after_s=self.analytics_flush_after_s,
            segment_rows=self.analytics_segment_rows,
            join_segments=self.analytics_join_segments,
        )

    def retention(self) -> Retention:
        """How long is kept what was logged."""
        return Retention(
            predictions=timedelta(days=self.analytics_keep_days),
            prediction_bytes=self.analytics_keep_bytes,
            outcomes=timedelta(days=self.analytics_keep_outcomes_days),
        )
