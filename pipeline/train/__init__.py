"""The training step, the loop, the worker and the driver."""
