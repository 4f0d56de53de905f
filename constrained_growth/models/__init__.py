"""How a user's model is run and watched, on one process or several, leaving no trace."""
