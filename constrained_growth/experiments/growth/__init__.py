"""Whether growing pays, and how to go on after an insertion."""
