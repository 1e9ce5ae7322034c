"""The hot routes before ASGI, on uvicorn's httptools protocol. Read in this order: front (what all
connections share: limits, draining, the sweep that enforces deadlines), exchange (one hot request in its
connection's pipeline), hardened (deadlines, bounds and order of one connection), protocol (which requests are
hot)."""
