"""The stages of the preset `photo`."""
