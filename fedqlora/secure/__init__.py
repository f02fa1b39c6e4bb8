"""Secure aggregation: the coordinator learns the sum of the sites' updates and none of them."""
