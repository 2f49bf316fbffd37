"""One relay process: its listening sockets and its life cycle."""
