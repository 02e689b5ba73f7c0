"""The files of a run: config, logs, checkpoints, and the tensors that a method stores."""
