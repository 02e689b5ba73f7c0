"""What a config may say (`schema`), how YAML becomes it (`reading`), presets, and the registry of names."""
