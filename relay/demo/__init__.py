"""`smtp-dup demo`: the product with two mail servers of its own."""
