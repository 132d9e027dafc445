"""One module per program that is measured, run in that program's environment.

A module imports nothing but the standard library when it is imported, and has:

* `REQUIREMENTS`: what pip installs, and `BUILD`: environment variables for it; an empty tuple means Quire's own
  environment; `UNWANTED`, if there is one: dependencies that are taken out again;
* `prepare(checkpoint, folder, precision)`: builds what pip does not, converts the checkpoint, and returns the path that
  is loaded;
* `Peer(path, request)`: the program with the model loaded, an `Engine` of `cpu_peers.measure`, whose class has `skips`.

Both may raise `Unavailable` with the reason, which then stands in the table.
"""
