"""Values of mail: replies, envelopes, records, destinations, ids, and what is computed from them. No I/O."""
