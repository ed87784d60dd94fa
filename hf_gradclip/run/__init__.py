"""What a run needs and no framework knows: marks, losses, replicas, records, state files, updates of any optimizer."""
