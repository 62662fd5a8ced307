"""Keys, signatures, certificates, capabilities and signed chains: what institutions prove to each other, and how."""
