"""Connections to Redis: clients, Sentinels, pipelines, and the embedded server."""
