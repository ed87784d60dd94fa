"""Runs that are killed and resumed: where, what runs them, and what they must come to."""
