"""Long contexts put together from short texts: training data that asks for every part of a context (IN2, arXiv 2404.16811)."""
