"""Where the console script was up to 0.1.0: what pip wrote for an editable install of that still imports it."""

from relay.command.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
