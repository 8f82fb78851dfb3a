"""Multi-head latent attention: one latent a token for keys and values, and a few rotated keys that all heads share."""
