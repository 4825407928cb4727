"""Benchmarks, run from a clone: ``python -m benchmarks OP`` or ``prism-fast bench OP``. Not part of the package."""
