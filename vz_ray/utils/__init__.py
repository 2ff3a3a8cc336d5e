"""Helpers without business logic: timeouts, signals, atomic files, processes. Imports nothing from vz_ray."""
