"""`python -m relay.command` is `smtp-dup`."""

from relay.command.main import main

main()
