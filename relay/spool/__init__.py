"""The spool: messages as files while Redis cannot take them, and their way into the ledger."""
