"""Monitoring: the status server (health, readiness, metrics) and the probes behind it and behind `check`."""
