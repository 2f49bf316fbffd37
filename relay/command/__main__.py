"""`python -m relay.command` is `smtp-dup`."""

from relay.command.entry import main

main()
