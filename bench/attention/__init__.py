"""`microvlm-bench attention`: what a model's attention rests on, how isotropic its codes are, and how both drift."""
