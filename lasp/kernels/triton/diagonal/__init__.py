"""Linear attention with a vector gate: a diagonal decay."""
