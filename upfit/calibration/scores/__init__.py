"""Attention scores as a least-squares problem in the projections that make them, and the fit that solves it."""
