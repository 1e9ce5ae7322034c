"""The gateway: everything that clients talk to.

Read in this order: `app` (wiring; `processes`, several of them), `targets` (which paths are hot), `hot/` (the
hot routes before ASGI), `call` and `predict` (one hot request, whatever brought it), `reading` (large bodies
in threads), `keys`, `limiter` and `leases` (who, and how often), `regions` (their shared memory), `admission`
(how many at once), `catalogue`, `pools` (what workers say of themselves), `signature`, `asked`, `plans`,
`infer_plans` and `v2_plans` (what can be called, with what, and what is the same in every call), `speaking`,
`dialects`, `oip_dialects` and `codecs/` (bytes to tensors and back), `channel` and `router_client`, `rest/`
(every other route), `oip_server` and `rpc/` (gRPC: what is served, and how), `jobs/` (over many rows, beside
all this), `metrics`; `bus.followed` of what is shared keeps the control topics at hand while Kafka is away.
Leaves: `settings`, `errors` (of HTTP itself), `datatypes`, `compression` (of bodies).
"""
