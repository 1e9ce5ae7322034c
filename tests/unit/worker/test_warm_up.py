"""What the first runs teach."""

from __future__ import annotations

from typing import cast

import pytest

from services.worker.execution import Runner
from services.worker.input_layout import InputLayout
from services.worker.run_time import RunTime
from services.worker.warm_up import warm_up
from tests.fixtures.loaded_model import SIGNATURE, Gated


@pytest.mark.parametrize("max_rows", [1, 2, 64])
def test_two_sizes_are_measured_so_that_larger_ones_can_be_judged(max_rows: int) -> None:
    sizes: list[int] = []
    layout = InputLayout(SIGNATURE)

    class Noting:  # no subclass: what is compiled takes none
        def observe(self, rows: int, seconds: float, now: float) -> None:
            assert seconds > 0
            sizes.append(rows)

    run_time = cast("RunTime", Noting())
    warm = warm_up(Runner(Gated(), SIGNATURE, layout), layout, max_rows, run_time)
    assert warm.ran
    assert set(sizes) == {1, max(2, max_rows)}
    assert warm.best.rows >= 1
    assert warm.best.rows_per_s > 0
