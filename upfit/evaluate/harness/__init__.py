"""Tasks of lm-evaluation-harness, with intervals and paired differences."""
