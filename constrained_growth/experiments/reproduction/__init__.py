"""The source's experiments, run again and held to account."""
