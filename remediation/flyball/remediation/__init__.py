"""Acts: leases that are verified and let go, notifications, enforcement points."""
