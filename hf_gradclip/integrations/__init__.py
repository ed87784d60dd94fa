"""Where frameworks call us: thin. A framework is imported here and nowhere else."""
