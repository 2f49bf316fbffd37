"""Keeps the ledger and RQ consistent: the reconciler and its sweeps, in the housekeeping process."""
