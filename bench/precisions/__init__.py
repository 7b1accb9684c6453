"""`microvlm-bench precisions`: what each width of weights costs a decoder on real texts, and what it weighs."""
