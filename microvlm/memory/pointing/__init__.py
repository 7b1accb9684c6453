"""Which entry of the log a reading points at, and how surely. Imports no torch."""
