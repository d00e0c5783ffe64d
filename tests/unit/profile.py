"""How Hypothesis runs here: the same examples every time, and no deadline on a loaded machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

fixed = settings(derandomize=True, deadline=None, max_examples=100, database=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
