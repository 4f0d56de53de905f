"""How well rules decide: every site really tried."""
