"""Upfit gives a pretrained language model a new attention, and makes it good again."""

__version__ = "0.1.0"
