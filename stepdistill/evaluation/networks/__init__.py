"""The networks whose features are measured, and the resizing that belongs to them."""
