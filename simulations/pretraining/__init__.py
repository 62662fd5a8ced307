"""How the tiny model in the box is made: its vocabulary, its pictures, its questions, its training."""
