"""Start and end of a service process. Read in this order: run.py (signals, exit codes), health.py (what is
ready and why not), ops.py (health and metrics over HTTP), serving.py (uvicorn inside our own loop)."""

from services.common.errors import Fatal
from services.common.lifecycle.health import Health
from services.common.lifecycle.ops import OpsEndpoints, ops_app
from services.common.lifecycle.run import run, until_stopped
from services.common.lifecycle.serving import serve_asgi
from services.common.lifecycle.watch import watched

__all__ = ["Fatal", "Health", "OpsEndpoints", "ops_app", "run", "serve_asgi", "until_stopped", "watched"]
