"""One run: its setup, its loop, its checkpoints and its metrics."""
