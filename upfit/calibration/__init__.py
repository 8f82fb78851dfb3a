"""A model run on text with one layer in memory: watched, tested for what may be changed, summed up in statistics."""
