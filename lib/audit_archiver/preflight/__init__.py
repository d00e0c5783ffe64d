"""Checks made before anything moves; each is a function with an id, a severity and a remedy."""
