"""The backup leg of smtp-dup: RQ workers, retry policy, failed copies, reconciliation."""
