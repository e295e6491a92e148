"""What was trained before, looked at again: any step of a run, and where two runs part."""
