"""Reports of evaluations: their content, the files that they are written to, and their comparison."""
