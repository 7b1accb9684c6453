"""`microvlm-data images`: captioned pictures of any common layout, looked at, counted, split and written as shards."""
