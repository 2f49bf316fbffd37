"""What keeps the ledger and RQ in step: the reconciler and its sweeps."""
