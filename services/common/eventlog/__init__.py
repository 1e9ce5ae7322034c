"""Write-ahead log of events on local disk, published in order. Read in this order: log, spool, framing,
cursor, predictions, forms; left (what processes of other names left)."""

from services.common.eventlog.left import publish_left, publishing_left
from services.common.eventlog.log import EventLog
from services.common.eventlog.predictions import PredictionJoin, join_predictions

__all__ = ["EventLog", "PredictionJoin", "join_predictions", "publish_left", "publishing_left"]
