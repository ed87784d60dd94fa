"""Read and scale memory. Every backend has the same functions: sumsq, max_abs, scale_, clamp_."""
