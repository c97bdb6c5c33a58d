"""DeepSpeed behind a few methods: forward, backward, step, save, load."""
