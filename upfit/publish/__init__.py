"""`upfit push`: a finished folder to the hub, with a model card made from its own records."""
