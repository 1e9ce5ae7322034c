"""The registry's settings, all from the environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.common.settings import ArtifactSettings, DatabaseSettings, Port, ServiceSettings


class Settings(ServiceSettings, DatabaseSettings, ArtifactSettings):
    """What the registry reads beside what every service reads."""

    http_port: Port = 8030
    grpc_port: Port = 8031
    #: The whole text of an API key that is let in with scope admin; empty: none.
    bootstrap_admin_key: Annotated[str, Field(repr=False)] = ""
    #: Uploads that may run at once (of which one key alone gets half), the bytes of one, and the seconds it
    #: may take.
    max_uploads: Annotated[int, Field(ge=1, le=100)] = 8
    max_upload_bytes: Annotated[int, Field(ge=1)] = 20 << 30
    upload_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    #: Experiments and rollouts are forgotten, with what was found, so many days after they were closed.
    registry_keep_trials_days: Annotated[float, Field(gt=0, le=36_500)] = 365.0
    #: How often the control topics are compared with the database.
    republish_check_s: Annotated[float, Field(gt=0)] = 5.0
