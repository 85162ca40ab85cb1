"""A seeded simulator of an AI estate with faults and their ground truth: what tests, the demo and the benchmark run on.

from flyball.lab import Lab, incident

lab = Lab(make_governor, seed=1)
lab.at("90s").provider("b").fails(0.6)
lab.expect("2m", incident(root="provider:b"))
"""

from flyball.lab.estate import Estate, default_estate
from flyball.lab.export import to_ndjson, write_ndjson
from flyball.lab.scenario import Lab, incident
from flyball.lab.score import ScoreTable, score
from flyball.lab.sim import Simulator

__all__ = [
    "Estate",
    "Lab",
    "ScoreTable",
    "Simulator",
    "default_estate",
    "incident",
    "score",
    "to_ndjson",
    "write_ndjson",
]
