"""The explorer: one page of a run to look at, search and tick rows in, in a file or served."""
