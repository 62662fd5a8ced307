"""A federation of real institutions: keys and certificates, the processes of server and sites, their supervision."""
