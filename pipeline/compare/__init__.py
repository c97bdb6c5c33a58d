"""What runs of a tracker have in common, where they differ, and what came of it."""
