"""The embedded stack: real servers and the six services as processes on loopback.

Read in this order: `process` (one child that dies with its parent), `server` (what all servers share), then
the servers themselves: `postgres`, `valkey`, `tansu`, `apache_kafka`.
"""
