"""Files and folders that are written: whole or not at all, checked before the work that fills them."""
