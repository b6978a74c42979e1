"""Studies: memorization, in- and out-of-distribution rows, and the pictures of the notebooks."""
