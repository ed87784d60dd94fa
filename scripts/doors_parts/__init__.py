"""The tools of doors.py, each a module with a DOOR, and what their checks share. Nothing installed is imported here."""
