"""Ways to reach people: one file, one kind. Adding one is adding a file with one class (see `_base.Notifier`)."""

from flyball.remediation.notifiers._settings import Channel, EgressSettings, NotifySettings, OwnerRule, Route

__all__ = ["Channel", "EgressSettings", "NotifySettings", "OwnerRule", "Route"]
