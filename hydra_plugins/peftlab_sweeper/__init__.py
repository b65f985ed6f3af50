"""Hydra plugins of peftlab: the sweeper, and the launcher with worker processes.

Hydra executes every module here whose name has no leading underscore, a second time if it was
imported before: those stay small and import the rest only when they run.
"""
