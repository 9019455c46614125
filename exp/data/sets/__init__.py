"""One short file of facts a data set."""
