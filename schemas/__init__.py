"""The JSON Schemas of every format, one file each; a released one is never edited."""
