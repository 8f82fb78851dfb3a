"""Upfit gives a pretrained language model a new attention, and makes it good again.

Importing it makes transformers' auto classes know the model types that Upfit writes (see `modeling/registry.py`).
"""

from upfit.modeling.registry import announce

__version__ = "0.1.0"

announce()
