"""The capacity planner: layouts of a model on hardware that need not be there, by replaying routes through our code."""
