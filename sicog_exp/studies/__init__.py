"""Many loops: several arms and seeds of one recipe, compared."""
