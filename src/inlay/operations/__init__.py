"""What is done with adapters of any method; each operation is written once."""
