"""The SMTP front end of smtp-dup: sessions, the primary leg, the ledger and the spool."""

__version__ = "0.1.0"
