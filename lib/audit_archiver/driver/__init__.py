"""What composes the stages: aa-archive and aa-txn."""
