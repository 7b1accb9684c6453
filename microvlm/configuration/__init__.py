"""Parts of a configuration, and how they check their values. numpy only."""
