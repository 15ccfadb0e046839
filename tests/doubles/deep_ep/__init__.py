"""Doubles of DeepEP over any communicator, clause by clause from its sources."""
