"""How well rules decide: every site is really tried."""
