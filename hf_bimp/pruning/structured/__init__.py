"""Whole filters: which depend on each other, and how they are taken out."""
