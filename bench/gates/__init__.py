"""`microvlm-bench gate` and `history`: limits on saved documents, and the store that keeps documents over commits."""
