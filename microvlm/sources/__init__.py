"""Where a model comes from (a folder, a bundled name, the hub), and where made files are kept. Imports no torch."""
