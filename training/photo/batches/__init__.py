"""Questions about encoded pictures, and batches of them."""
