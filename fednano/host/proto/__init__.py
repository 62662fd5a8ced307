"""Generated protocol code of the language host."""
