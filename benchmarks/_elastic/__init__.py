"""The two sides of elastic.py, and what is the best that could be."""
