"""The hot routes before ASGI: a subclass of uvicorn's httptools protocol. Read in this order: exchange (one
hot request in a connection's pipeline), protocol (which requests are hot, deadlines, limits, order), front
(what all connections share: limits, draining, the sweep that enforces deadlines)."""
