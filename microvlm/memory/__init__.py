"""The episodic memory: states, their file, facts and conversations. Imports no torch."""
