"""Four-bit weights that are fitted to texts when a model is exported, in place of rounding them one by one."""
