"""Is the archive what was written, and is every row in one place? Reads only, but for the index that it can rebuild."""
