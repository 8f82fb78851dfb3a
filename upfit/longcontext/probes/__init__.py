"""Contexts with questions whose answers stand at known depths: what is within a model's reach. Knows tokenizers, no models."""
