"""The backlog and the failed list as data, for operators."""
