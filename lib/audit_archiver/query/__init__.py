"""Read the archive without bringing it back: which rows are meant, where they may be, and what stands in them."""
