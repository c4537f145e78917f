"""Benches: losses against other people's (`losses`), and whole training steps by phase (`step`)."""
