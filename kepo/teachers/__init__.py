"""Teachers that another process serves, and several teachers chosen by a column of the data."""
