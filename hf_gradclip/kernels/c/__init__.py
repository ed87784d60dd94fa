"""C, for memory of a CPU: one read measures, one write changes. Compiled where the package is installed."""
