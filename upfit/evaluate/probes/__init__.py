"""What a model finds in a text and what its heads look at: one file for each probe, and a list of them."""
