"""Read rows of files and hub datasets, and turn them into examples of token ids."""
