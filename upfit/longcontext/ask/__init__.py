"""Where questions come from: rules over text and invented facts (`template`), question sets (`dataset`), language models
(`model`)."""
