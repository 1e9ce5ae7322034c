"""What runs a model version. Read `port.py` first; every other file is one backend, and the only place where
its runtime may be imported."""
