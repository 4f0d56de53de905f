"""Whether a block or rule of your own does what the library relies on, or what is wrong with it."""

from constrained_growth.testing.block import check_block
from constrained_growth.testing.rule import check_rule

__all__ = ["check_block", "check_rule"]
