"""Encoder-decoders: the loss of what the decoder writes for what the encoder reads, both caches, and words that are heard."""
