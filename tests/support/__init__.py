"""What the tests share: real servers, clients and the product itself, each with a guaranteed end."""
