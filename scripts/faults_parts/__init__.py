"""Faults in gradients by the thousand: which cases, what runs them, and what is right of each."""
