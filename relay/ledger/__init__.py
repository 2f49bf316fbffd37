"""The ledger: the state of every copy in Redis, its keys, and every change of it."""
