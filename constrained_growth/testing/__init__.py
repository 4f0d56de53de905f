"""Whether a block of your own does what the library relies on, and if not, what is wrong."""

from constrained_growth.testing.block import check_block

__all__ = ["check_block"]
