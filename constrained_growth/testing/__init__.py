"""Check that your own block or rule does what the library relies on."""

from constrained_growth.testing.block import check_block
from constrained_growth.testing.rule import check_rule

__all__ = ["check_block", "check_rule"]
