"""Sources, safe image loading, chat template and label mask, packing, mixture, the built-in world."""
