"""Benchmarks of the fused kernels: `python -m benchmarks run`, or `pytest benchmarks` (docs/performance.md)."""
