"""One file per method; `conf/method/` is the list of methods."""
