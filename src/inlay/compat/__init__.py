"""Standing in for other libraries, under their names."""
