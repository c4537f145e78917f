"""The command line: verbs, and no logic of their own."""
