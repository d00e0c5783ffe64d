"""The lock of a run: PostgreSQL's advisory keys, which have the last word, and on top of them a record in Redis or in a file."""
