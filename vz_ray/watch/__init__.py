"""Looking at a run while it goes on: what the driver tells of it, and the screen that shows it.

In: what the training loop says that it does, episodes as they are accepted, the
fleet's and the clip pool's own counts. Out: Ray's metrics, `live.json`, traces,
rows for trackers; and, from the run directory alone, the view of `vz-ray top`.
It must not know how anything is learned, and nothing of it may stop a run. Nothing is
imported here, so that the view is there at once.
"""
