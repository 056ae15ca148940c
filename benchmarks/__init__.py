"""Side by side with the peers: see README.md. ``python -m benchmarks`` runs every comparison."""
