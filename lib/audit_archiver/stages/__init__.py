"""One file per stage of the pipeline; no stage imports another."""
