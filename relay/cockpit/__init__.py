"""What an operator sees and decides: the flow of mail, and whether a backup is ready to be the primary."""
