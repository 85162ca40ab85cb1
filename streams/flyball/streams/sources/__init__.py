"""Where bytes come from, when Flyball fetches them itself."""
