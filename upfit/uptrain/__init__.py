"""`upfit uptrain` and `upfit prepare`: trains a converted model on text, on questions, or against its former self."""
