"""The public functions, for notebooks and scripts; the command line calls the same ones."""
