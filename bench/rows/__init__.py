"""The rows of the benchmark: one function each, that fills a Row."""
