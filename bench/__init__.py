"""Benchmarks, run from the repository's root: ``python -m bench.end_to_end``, ``python -m bench.compare``,
``python -m bench.quality``, ``bench/run_device`` on a machine with a GPU, then ``python -m bench.report``."""
