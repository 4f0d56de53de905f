"""Experiments on small data sets, and the command line that runs them."""
