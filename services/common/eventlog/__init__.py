"""Write-ahead log of events on local disk, published in order. Read in this order: log, spool, framing,
cursor, predictions, forms."""

from services.common.eventlog.log import EventLog
from services.common.eventlog.predictions import PredictionJoin, join_predictions

__all__ = ["EventLog", "PredictionJoin", "join_predictions"]
