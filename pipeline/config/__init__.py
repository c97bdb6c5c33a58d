"""What a run is: the frozen schema, how it is loaded, and the numbers derived from it."""
