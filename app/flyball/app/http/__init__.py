"""The HTTP interface of `flyball run`: telemetry in, incidents and directives out."""
