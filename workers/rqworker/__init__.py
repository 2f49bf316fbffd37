"""RQ's side: the worker, its job class, the scheduler, and what a dead worker had in hand."""
