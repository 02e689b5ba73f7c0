"""Real images: folders, WebDataset shards and data sets of the `datasets` library, in buckets and crops."""
