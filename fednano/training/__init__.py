"""Training NanoEdge on a client: data, features, objectives, the local loop, the Fisher."""
