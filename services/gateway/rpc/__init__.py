"""The gRPC front: many calls per connection, on an HTTP/2 data path of our own.

Read in this order: limits (bounds of one connection), statuses (what calls end with, as bytes), methods (what
is served beside the hot ones), heads (what a call's header block says), streams (one call on its connection),
sending, control and connection (the data path), exchange (ModelInfer: a hot call, for which no task is made),
infer_stream (ModelStreamInfer: many hot calls on one stream), tasks (every other method, by the servicers
that grpcio's generated code registers), server (listening, the sweep that enforces deadlines, draining).
"""
