"""Parts of the unlearning study: its model, its data, its cells."""
