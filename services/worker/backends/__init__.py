"""What runs a model version. Read `port.py` first, then `registry.py` (which backend by which name); every
other file is one backend, and the only place where its runtime may be imported: `onnx.py` (small batches by
`onnx_bindings.py`), `embedding.py`."""
