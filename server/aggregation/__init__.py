"""Aggregation: how the sites' updates become one, a method a file."""
