"""Delivery of copies to one backup: claim, connections, transactions, outcomes, retry policy."""
