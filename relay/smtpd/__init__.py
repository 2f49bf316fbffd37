"""The client's side: protocol, commands, and the mail transaction from MAIL to the reply to its dot."""
