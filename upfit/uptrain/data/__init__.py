"""From text to token shards, and from shards to the rows of a training step."""
