"""What makes this package known to others; each file is for those who have that library."""
