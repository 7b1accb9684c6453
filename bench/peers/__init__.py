"""`microvlm-bench peers`: other programs' speed and memory beside ours, in one run and in turns."""
