"""The method, in NumPy alone: who is perturbed, by what step, and what rewards become."""
