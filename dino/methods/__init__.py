"""What is learned, and how: one file a method; the trainer knows a method only by its interface (method.py)."""
