"""`upfit plan`: FLOPs, memory and hours of a training, before anything runs."""
