"""The hand-over of released copies from a relay process to a worker of the same host, for a first try at once."""
