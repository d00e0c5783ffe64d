"""The archiver tried on somebody's own scratch database and bucket: what aa-selftest does, and cleans up."""
