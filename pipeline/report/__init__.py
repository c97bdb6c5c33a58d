"""One HTML file on a run, of what its tracker knows: did it work, how did it go, what next."""
