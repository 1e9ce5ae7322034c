"""Every server that can be measured, by the name that `--only` takes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.targets.headrace import HeadraceTarget
from benchmarks.targets.port import Target
from benchmarks.targets.python_peers import (
    BentoMLPeer,
    KServePeer,
    LitServePeer,
    MLServerBatchingPeer,
    MLServerPeer,
    RayServePeer,
)
from benchmarks.targets.triton import TritonPeer

TARGETS: dict[str, Callable[[], Target]] = {
    "headrace": HeadraceTarget,
    "triton": TritonPeer,
    "mlserver": MLServerPeer,
    "mlserver-batching": MLServerBatchingPeer,
    "litserve": LitServePeer,
    "bentoml": BentoMLPeer,
    "ray": RayServePeer,
    "kserve": KServePeer,
}
#: Left out unless asked for, or in the full plan.
ONLY_FULL = frozenset({"mlserver-batching"})
