"""`upfit evaluate`: loss, KV cache, speed, probes, and tasks of lm-evaluation-harness."""
