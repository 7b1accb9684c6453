"""What lets other programs run a bundle: files that are copied into it, and variants of its graphs."""
