"""Write-ahead log of events on local disk, published in order. Read in this order: log, spool, framing,
cursor, predictions."""

from services.common.eventlog.log import EventLog
from services.common.eventlog.predictions import join_predictions

__all__ = ["EventLog", "join_predictions"]
