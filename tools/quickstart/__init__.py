"""The first run: a small task, made here, and the ordinary commands on it."""
