"""A model folder on disk: found, read, rewritten, whole or absent. Knows no model class."""
