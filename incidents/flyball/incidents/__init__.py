"""From anomalies to incidents: correlation, root ranking, lifecycle, enrichment and silences. Pure: time comes in as data.

The stage is `flyball.incidents.correlator.Correlator`; every figure it needs comes from the windows and events it is fed.
"""
