"""sessiond keeps what a language model remembers of every conversation. Imports nothing (clients stay light)."""
