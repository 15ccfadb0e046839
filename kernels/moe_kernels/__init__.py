"""Kernels of a mixture-of-experts model: one folder per operation, torch and Triton only.

A folder's `__init__` holds the contract and the choice of backend, `reference.py` the fp64 oracle that the tests
compare with, and one file per backend the rest. Nothing here knows about ranks, checkpoints or configuration.
"""
