"""RQ's side of delivery: the worker, its job class, the scheduler, and the revival of a dead worker's jobs."""
