"""`upfit convert` and `upfit merge`. Files here serve every attention; each folder is one attention."""
