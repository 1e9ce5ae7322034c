"""The hot routes before ASGI, on uvicorn's httptools protocol. Read in this order: front (what all
connections share: limits, draining, the sweep that enforces deadlines), heads (what was parsed before),
exchange (one hot request in its connection's pipeline), deadlines (what one connection waits for, and how
long), pipeline (answers in the order of their requests), hardened (what is read from one connection, and
its bounds), receiving (large bodies, read to where they stay), protocol (which requests are hot)."""
