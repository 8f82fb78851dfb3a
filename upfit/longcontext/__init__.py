"""`upfit synth`: questions whose answers stand anywhere in a long context (IN2, arXiv 2404.16811)."""
