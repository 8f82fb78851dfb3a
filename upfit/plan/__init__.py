"""What an uptraining will cost, before anything runs: FLOPs, memory, hours."""
