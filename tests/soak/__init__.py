"""An hour of random use and random trouble, and then a look at what is left: ``python -m tests.soak``."""
