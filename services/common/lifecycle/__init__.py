"""Start and end of a service process. Read in this order: run.py (signals, exit codes), memory.py (what is
kept of freed memory), health.py and watch.py (what is ready and why not), ops.py (health and metrics over
HTTP), serving.py (uvicorn inside our own loop), processes.py, liveness.py and joint_ops.py (several processes
of one service on the same ports), cores.py (each on its own core)."""

from services.common.errors import Fatal
from services.common.lifecycle.cores import cores_for, roam, stay_on
from services.common.lifecycle.health import Health
from services.common.lifecycle.joint_ops import JointOps
from services.common.lifecycle.memory import give_freed_memory_back, keep_freed_memory
from services.common.lifecycle.ops import OpsEndpoints, ops_app
from services.common.lifecycle.processes import ProcessGroup, end_with_parent, held_port, usable_cores
from services.common.lifecycle.run import run, until_stopped
from services.common.lifecycle.serving import serve_asgi
from services.common.lifecycle.watch import watched

__all__ = [
    "Fatal",
    "Health",
    "JointOps",
    "OpsEndpoints",
    "ProcessGroup",
    "cores_for",
    "end_with_parent",
    "give_freed_memory_back",
    "held_port",
    "keep_freed_memory",
    "ops_app",
    "roam",
    "run",
    "serve_asgi",
    "stay_on",
    "until_stopped",
    "usable_cores",
    "watched",
]
