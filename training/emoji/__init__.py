"""The curriculum of the bundled `nano`: emoji, scenes and facts, as data sets, batches, losses and stages."""
