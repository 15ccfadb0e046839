"""Benchmarks: `python -m moe_tools.bench throughput|ranks|kernels|slice`."""
