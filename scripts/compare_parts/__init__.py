"""Trainings that differ in how they clip: what is learnt, what runs them, their rows, tables and pictures."""
