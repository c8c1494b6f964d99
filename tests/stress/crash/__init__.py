"""kill -9 while the desk works: what is lost, what is on the disk that the vault does not know."""
