"""What a terminal can do: complete words, show pictures, move a bar. Knows no model and imports no numpy by itself."""
