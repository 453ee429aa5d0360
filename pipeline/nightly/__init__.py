"""Every night: what is new is embedded, the rest is carried from the night before."""
