"""The machinery of comparisons: what a study says, its jobs, tuning, and the table."""
