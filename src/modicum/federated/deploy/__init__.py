"""Flower's deployment engine: certificates, node keys, a server with TLS, and nodes it knows."""
