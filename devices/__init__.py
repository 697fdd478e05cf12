"""Device profiles, cost curves and the planner."""
