"""Rows of files and hub data sets, and the examples in token ids that are made from them."""
