"""The runbook that `flyball runbook new` writes: short, commented, tested, and right as it stands."""

from __future__ import annotations

import re
from typing import Final

from flyball.core.errors import ConfigError
from flyball.runbooks.schema import MAX_NAME, NAME_PATTERN

_TEMPLATE: Final = """\
# Say here in one sentence what this protects from.
#
# As it stands it moves calls away from a provider that fails. Change what it is for, what it does and how that is proved;
# then look whether it is right, and play its tests:
#
#   flyball runbook lint {name}.yaml
#   flyball runbook test {name}.yaml
runbook: v1
name: {name}
owner: platform            # who is asked about it
description: Moves calls of a failing provider to a healthy one until it has recovered.

# For which incidents, as a CEL condition. An unknown name, signal or label is an error with line and column.
when: >-
  incident.root.kind == "provider"
  && incident.signal == "llm.errors"
  && incident.severity >= HIGH
hold: 0s                   # how long that must stay true first
max_age: 3m                # an incident without news for this long is dropped, never acted on

# What it may do by itself: observe < suggest < approve < auto. To act it needs `auto` here and `--mode auto` of Flyball.
mode: suggest
approval: 10m              # how long a plan waits for a person

# Must hold on live traffic at the moment of acting; no data is not true.
preconditions:
  - id: still_failing
    check: 'errors({{"provider": incident.root.name}}, duration("30s")) > 0.1'

# Guards, all of them. What cannot be measured is refused.
limits:
  cooldown: 10m            # per target, after a run ended
  runs: 3/1h               # of this runbook
  attempts: 2              # for one incident
  breaker: 3/1h            # failed or unverified runs, then it stays off until a person resets it
  blast: {{traffic: 75%, tenants: 1000}}

# What is done, stage by stage, each proved before the next. An effect is a lease: it ends by itself after `for` at the
# latest, after `lease` when Flyball is dead, and as soon as what it protects from is over.
steps:
  - redirect: {{from: $incident.root, to: best_healthy, share: [25%, 100%], for: 1h, lease: 5m}}
    verify: {{within: 3m, expect: 'errors("to") < 0.02', against: untouched}}

on_failure: undo_and_page

# Faults of the lab, and what must come of each: one in which it acts, one in which it must not.
tests:
  - name: an outage of one provider is left and returned from
    lab: outage(provider="b", fails=0.6)
    expect: [run, verified, released]
  - name: with every provider failing there is nowhere to go
    lab: outage(all_providers)
    expect: [refuse(no_candidate)]
"""


def new_runbook(name: str) -> str:
    """The text of a first runbook of this name.

    Raises: ConfigError when it is no name.
    """
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > MAX_NAME:
        what = f"{name[:80]!r} is no name; write lower case words joined by `-`, such as slow-provider"
        raise ConfigError(what)
    return _TEMPLATE.format(name=name)
