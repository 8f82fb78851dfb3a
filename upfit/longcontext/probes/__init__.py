"""Contexts with questions whose answers stand at known depths, for measuring. Knows tokenizers, no models."""
