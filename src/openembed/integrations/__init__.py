"""Other people's systems: databases that hold our vectors, and frameworks that take our models in their own shape."""
