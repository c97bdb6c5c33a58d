"""What a run has learned, in forms that others load."""
