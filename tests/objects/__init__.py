"""S3 servers on loopback, real processes: one that enforces conditions, and one that ignores them."""
