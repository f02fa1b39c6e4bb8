"""Benchmarks: each script prints the ratio that the README quotes."""
