"""How many cases each property gets: a few in CI, thousands with

    pytest tests/fuzz -n 4 --hypothesis-profile long

What hypothesis finds it makes small, prints, and tries first the next time (.hypothesis).
"""

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("few", max_examples=25, **COMMON)
settings.register_profile("long", max_examples=1500, **COMMON)
settings.load_profile("few")
