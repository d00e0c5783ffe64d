"""From the archive back into a table: choose batches, compare shapes, load, settle conflicts, set sequences, keep account."""
