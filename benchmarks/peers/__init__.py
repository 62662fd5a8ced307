"""What others would write: apps that benchmarks compare with."""
