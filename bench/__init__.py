"""Benchmarks, run from the repository's root: ``python -m bench.cpu_vision``, ``python -m bench.report``."""
