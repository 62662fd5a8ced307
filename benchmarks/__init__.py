"""Benchmarks. A package, since Opacus installs one of this bare name, which would win over a mere folder."""
