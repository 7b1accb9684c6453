"""The episodic memory: states, file, facts and conversations. numpy only."""
