"""What a recorded run shows, and what other strategies would have done in it."""
