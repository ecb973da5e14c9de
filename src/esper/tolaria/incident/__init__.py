"""Incidents: what happened, kept so that it can be gone through again."""

from esper.tolaria.incident.listener import IncidentRecorder, NoIncidents
from esper.tolaria.incident.opening import open_incidents
from esper.tolaria.incident.record import (
    Incident,
    find_incident,
    incident_directories,
    read_incident,
    read_unrecorded,
)
from esper.tolaria.incident.recorder import Incidents, Sources

__all__ = [
    "Incident",
    "IncidentRecorder",
    "Incidents",
    "NoIncidents",
    "Sources",
    "find_incident",
    "incident_directories",
    "open_incidents",
    "read_incident",
    "read_unrecorded",
]
