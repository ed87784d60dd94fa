"""What a run records of every step: buffered on the device, kept as Parquet, with the spikes beside it."""
