"""The side of other servers: connections to them, their replies, and the pool that keeps them."""
