"""The ledger: every key in Redis and every change of a copy's state."""
