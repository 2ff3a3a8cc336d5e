"""`python -m vz_ray.cli`."""

from vz_ray.cli import main

main()
