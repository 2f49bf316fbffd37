"""The spool: messages as files while Redis cannot take them, and their import into the ledger."""
