"""The command line: one command per method, and those that look at what they made."""
