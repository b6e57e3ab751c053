"""The work behind operators' commands, and the admin address; `gateway.commands` parses their arguments."""
