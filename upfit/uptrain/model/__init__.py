"""The model that learns, its teacher, the losses, and what is wrapped around them."""
