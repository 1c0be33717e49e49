"""The machine, and what outlives a run on it."""
