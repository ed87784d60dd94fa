"""Where frameworks call us: thin, and each framework is imported in one file here and nowhere else."""
