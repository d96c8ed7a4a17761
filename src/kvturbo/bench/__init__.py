"""Benchmarks of the operations: timing, providers to compare, and reports."""
