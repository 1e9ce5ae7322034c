"""The embedded stack: real servers and the six services as processes on loopback.

Read in call order: `__main__` and `commands` (the verbs), `stack` (start, ask, stop: what the command line
and the tests use), `supervise` and `supervisor` (the process in the background), `keeper` (one part: start,
watch, start again, let another take over), `guard` (ends everything when the supervisor is killed), `behind`
(what is done after a start: compile, and renew what then runs compiled). What is decided without touching
anything: `configuration` (environment), `blueprint` (the parts), `preflight` (what must hold before).

The parts: `process` (one child that dies with its parent), `priority` (and makes way for others), `server`
(what all have in common), `postgres`, `valkey`, `tansu`, `apache_kafka` (with `kafka_probe`), `service` (with
`native`: compiled modules), of which `front` (and `front_process`) is what runs where gateway and router
share a process. Beside them: `status`, `lock`, `log_files`, `secret_files`, `view`.
"""
