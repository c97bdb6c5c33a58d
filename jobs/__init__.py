"""Thin entry points for `ray job submit`; the work is done in `pipeline`."""
