"""`microvlm-bench loops`: predicted speed of the inner loops on a Cortex-A53, by two models of the core."""
