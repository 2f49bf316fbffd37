"""Trace: what became of each message, kept in files of an hour on each host and found by any of its words."""
