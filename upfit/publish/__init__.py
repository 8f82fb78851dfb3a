"""`upfit push`, `upfit compare`: a finished folder to the hub, with a card made from its own records."""
