"""Show runs: the comparison table, plots, the report page, the terminal and warnings."""
