"""What several families share: pipelines, UNets, transformers, CLIP encoders, tiny checkpoints for tests."""
