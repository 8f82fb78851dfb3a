"""Families that are converted as another family, which computes the same: one file for each of those."""
