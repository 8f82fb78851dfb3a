"""The tasks of the CoPE paper (Golovneva et al. 2024, arXiv 2405.18719, section 4) as exact generators.

Each file makes `Item`s: a pure function of a seeded `random.Random` and a few sizes. Nothing here knows of models, tokenizers
or tensors. A docstring says what of a generator is the source's and what is assumed.
"""
