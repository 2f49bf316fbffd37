"""Which server answers for which mail, and which get copies of it: decided by the routes of the settings."""
