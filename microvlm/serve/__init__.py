"""`microvlm serve`: a page to try models, and an OpenAI-compatible interface, over one process that runs the models.

The server (`server`, `guard`, `own_api`, `openai_api`) parses no picture and runs no model; `worker` does both, in a
process that may die. Neither imports torch, unless a model runs on the backend `torch`.
"""
