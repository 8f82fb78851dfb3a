"""`upfit report` and `upfit compare`: what other commands measured, as one HTML file or one table."""
