"""From features and images to numbers; one file a metric."""
