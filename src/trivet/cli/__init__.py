"""The command line: one command per method, and commands to inspect what the methods made."""
