"""Write-ahead log of events on local disk, published in order. Read in this order: log, spool, framing."""

from services.common.eventlog.log import EventLog

__all__ = ["EventLog"]
