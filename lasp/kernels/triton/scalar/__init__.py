"""Linear attention without decay, with a constant one, or with a scalar gate."""
