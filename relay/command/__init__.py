"""The console script `smtp-dup`: its commands, what they print, and how each kind of trouble ends."""
