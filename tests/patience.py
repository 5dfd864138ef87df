"""How long tests wait for what they expect: until it happens. The limit is for what hangs, on machines of any speed."""

PATIENCE = 600.0  # seconds
