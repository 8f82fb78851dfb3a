"""What a model is: its class built without weights, and where its queries, keys, values and outputs are stored."""
