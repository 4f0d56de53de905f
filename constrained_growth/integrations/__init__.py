"""Other libraries whose models and trainers are served; each needs the extra of its name."""
