"""Recipes: typed stages as data (``config``), TOML files (``files``), and the executor (``run``, ``stages``, ``report``)."""
