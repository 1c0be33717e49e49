"""The data that everything shares: the plan, its methods, what a run counts, what a model is."""
