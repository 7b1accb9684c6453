"""Pictures of nothing that has a name, which a model should decline."""
