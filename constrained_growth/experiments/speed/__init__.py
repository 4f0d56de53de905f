"""How fast the multipliers are, and how little data they need."""
