"""The processes of a run: started in order, restarted when they die, stopped in reverse."""
