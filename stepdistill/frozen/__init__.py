"""Frozen models that losses use beside the triple: vision encoders, and the critic of the embedded teacher."""
