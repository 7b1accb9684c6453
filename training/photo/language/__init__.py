"""The language of the preset `photo`: questions in many wordings, answers, and values of facts."""
