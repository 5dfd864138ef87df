"""The delta rule, without or with a scalar or vector gate."""
