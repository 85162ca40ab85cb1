"""How bytes of one kind become events: one file, one format, equal names. Stateless; content never passes."""
