"""What runs look like: the comparison table, plots, samples side by side."""
