"""The built-in bundle: a small language model and its adapter, made from words and drawings."""
