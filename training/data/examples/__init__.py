"""`microvlm-data examples`: photographs that packages carry under free licences, with our own captions."""
