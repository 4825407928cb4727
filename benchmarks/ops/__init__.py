"""One folder an op: its problems and ours (bench.py), inputs and truth (data.py), other libraries (peers.py)."""
