"""Facts whose values are any words: how often their own text comes back, and the fit of the confidence for it."""
