"""`microvlm-bench report --html`: saved documents as one self-contained page."""
