"""`fp4compile bench`: operators and whole layers, verified, then timed beside their peers."""
