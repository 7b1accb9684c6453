"""The preset `photo`: its language, data, batches and stages."""
