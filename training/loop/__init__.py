"""The training loop: steps, optimisers, states, and the files of a run."""
