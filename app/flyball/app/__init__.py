"""Settings, wiring, the embedded runtime, the command line and the HTTP interface: the only part that knows all others."""
