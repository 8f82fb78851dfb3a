"""`upfit report`: the story of a model folder as one HTML file. Reads what other verbs wrote; measures nothing itself."""
