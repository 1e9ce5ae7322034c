"""Each service imports and passes its unit tests with its own dependencies alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.isolation import SERVICES, prove


@pytest.mark.timeout(900)  # it builds wheels and an environment
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_stands_on_its_own_dependencies(service: str, tmp_path: Path) -> None:
    prove(service, tmp_path)
