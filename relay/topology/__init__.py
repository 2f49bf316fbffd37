"""Who is the primary now and who is a backup: decided in Redis, followed by every relay process without a restart."""
