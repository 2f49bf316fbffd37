"""Which processes there are, and the supervisor that keeps them."""
