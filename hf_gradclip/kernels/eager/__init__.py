"""Plain torch: every device, every dtype; what the other languages are checked against."""
