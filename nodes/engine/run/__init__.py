"""One sampling run: its methods, its guidance, its budget, and what watches it."""
