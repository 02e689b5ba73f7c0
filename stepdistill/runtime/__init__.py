"""How networks run, at equal results: kernels, quantization, sharding, parking, gradient checkpointing."""
