"""What every service shares, kept small. No service is imported here.

Read what you need. A process: `starting`, `lifecycle/`, `listening` (a listener's end), `settings`,
`telemetry/`, `tasks`, `clock`, `native` (how classes are marked that mypyc compiles). What crosses borders:
`topics`, `tensors`, `ids`, `errors`, `problems` (errors over HTTP), `bodies`, `multipart`, `frames/`,
`unary`, `grpc_serving`, `grpc_auth`, `grpc_health`, `internal_auth`, `credential`, `shared_memory`. What is
kept: `bus/`, `eventlog/`, `db/`, `objects/`. Who gets which variant: `experiments`, `targeting`,
`assignment`.
"""
