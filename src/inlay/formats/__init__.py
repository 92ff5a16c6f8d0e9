"""Files: what is on disk, and what it is called there."""
