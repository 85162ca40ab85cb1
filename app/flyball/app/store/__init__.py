"""The durable record: SQLite (embedded) through SQLAlchemy Core."""
